"""Whether the flow in this folder takes the parameters of the flow run that asks: `-m flows.fit`.

In a process of its own, so that the flow is that of this folder and not the one already imported.
"""

import os
import sys
from typing import Any
from uuid import UUID

from prefect import Flow, get_client
from prefect.exceptions import ParameterTypeError, SignatureMismatchError
from prefect.flows import load_flow_from_entrypoint


def main() -> int:
    """Exit code 1 and the reason on stderr where it does not."""
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(UUID(os.environ["PREFECT__FLOW_RUN_ID"]))
        assert run.deployment_id is not None  # the run of a deployment asks
        entrypoint = client.read_deployment(run.deployment_id).entrypoint
    assert entrypoint is not None
    try:
        flow: Flow[Any, Any] = load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)
        flow.validate_parameters(run.parameters)
    except (ParameterTypeError, SignatureMismatchError, OSError, AttributeError) as problem:
        print(" ".join(str(problem).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

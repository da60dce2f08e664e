"""The model card: a README.md beside the weights, readable by people and by model hubs."""

from collections.abc import Mapping
from typing import Any

import yaml

HEAD = {
    "license": "apache-2.0",
    "library_name": "djepa-t2i",
    "pipeline_tag": "text-to-image",
    "tags": ["djepa-t2i", "masked-autoregression", "flow-matching"],
}

TEXT = """---
{head}---

# A D-JEPA·T2I model

A text-to-image network after [D-JEPA·T2I](https://arxiv.org/abs/2411.14808). It was trained with
djepa-t2i, not by the paper's authors, and has none of their weights.

## Use

```python
from components.model import DJEPAPipeline

pipe = DJEPAPipeline.from_pretrained("this folder")
pipe("what to draw").images[0].save("picture.png")
```

The arguments are those of a diffusers pipeline; docs/pipeline.md of djepa-t2i lists them.

## What it is

{parts}

## Training

{facts}

## Limits

- It can draw what its training pictures showed, and knows the words of their captions. Nothing
  here says how far it goes beyond them.
- Sizes other than those trained on are possible, and worse the further they are from them.
- The pictures pass no filter. Whatever was wrong or one-sided in the training data may show.
- A score without its chance floor, number of pictures and error is not a result.
"""


def model_card(parts: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """README.md of a pipeline of these `parts`, its YAML head as model hubs read it.

    facts: what whoever saves it knows of its training, by name; said as they are.
    """
    network, tokenizer, text = parts["transformer"], parts["tokenizer"], parts["text_encoder"]
    sampler, config = parts["sampler"], parts["transformer"].config
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    described = {
        "network": f"{type(network).__name__}, {config.width} wide, {millions:.1f} M parameters",
        "an image token": f"{tokenizer.patch}x{tokenizer.patch} px in {tokenizer.channels} numbers",
        "text encoder": f"{type(text).__name__}, at most {text.length} tokens, frozen",
        "draws by itself": f"{sampler.width}x{sampler.height} px, {sampler.autoregressive_steps} "
        f"steps of {sampler.num_inference_steps} evaluations of the flow head ({sampler.solver}), "
        f"guidance {sampler.guidance_scale:g}",
        "licence": "Apache-2.0",
    }
    said = _table(facts) if facts else "Nothing was stated by whoever saved it."
    head = yaml.safe_dump(HEAD, sort_keys=False)
    return TEXT.format(head=head, parts=_table(described), facts=said)


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {rows[name]} |" for name in rows)])

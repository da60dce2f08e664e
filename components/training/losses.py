"""The two losses, both on hidden tokens only (paper, section 3.1; spec of D-JEPA for L_pred).

Shapes as in components/training/batch.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from components.errors import UserError
from components.model.dit import FlowDiT
from components.model.djepa import DJEPA, Encoder, target_features
from components.model.network import Network
from components.training.batch import Batch, grouped
from components.training.draw import Draw


def flow_path(x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x^t = t·x + (1 − t)·ε and its velocity x − ε; t = 0 is noise, t = 1 is data."""
    return t * x + (1 - t) * noise, x - noise


def velocity_error(model: DJEPA, batch: Batch, z: Tensor) -> Tensor:
    """Mean over draws and channels of ‖v_θ(x^t, t, z) − (x − ε)‖², (B, H), under z (B, H, D)."""
    x = batch.x[:, batch.visible :, None]
    t = batch.t if batch.picture is None else batch.t[:, batch.picture]
    moved, velocity = flow_path(x, batch.noise, t[..., None])
    return (model.head(moved, batch.t, z, batch.picture) - velocity).square().mean(dim=(2, 3))


def whole_error(model: FlowDiT, batch: Batch) -> Tensor:
    """The baseline's error: every token hidden, one time and noise a picture; (B, N)."""
    if batch.visible or batch.noise.shape[2] > 1 or batch.picture is not None:
        raise UserError(
            "The baseline transformer is trained on whole pictures of one shape with one draw "
            "each: set training.mask to 1, training.flow_samples=1 and training.batches=grouped, "
            "as ablation=dit does."
        )
    moved, velocity = flow_path(batch.x, batch.noise[:, :, 0], batch.t)
    text = model.text_in(batch.prompt)
    found = model.velocity(moved, batch.t[:, 0, 0], text, batch.layout)
    return (found - velocity).square().mean(dim=2)


def losses(
    model: Network, target_encoder: Encoder | None, batch: Batch, beta: float
) -> tuple[Tensor, Tensor]:
    """(L_flow, L_pred), scalars; L_pred is 0 without a target encoder.

    beta: of the smooth-L1 between the projected z and the target features.
    """
    if isinstance(model, FlowDiT):
        return whole_error(model, batch).mean(), batch.x.new_zeros(())
    assert isinstance(model, DJEPA)
    text = model.encoder.text_in(batch.prompt)
    z = model.predict(text, batch.x[:, : batch.visible], batch.layout)
    flow = velocity_error(model, batch, z).mean()
    if target_encoder is None:
        return flow, batch.x.new_zeros(())
    target = target_features(
        target_encoder, batch.whole_prompt, batch.x, batch.whole_layout, batch.visible
    )
    return flow, F.smooth_l1_loss(model.projection(z), target, beta=beta)


def flow_error(
    model: Network,
    latents: Tensor,
    text_states: Tensor,
    text_mask: Tensor,
    draw: Draw,
) -> Tensor:
    """Mean velocity error over the hidden tokens, (B,); what preference optimisation compares.

    latents (B, C, h, w); no prompt is dropped, whatever the draw says.
    """
    size = (latents.shape[3], latents.shape[2])
    tokens = latents.flatten(2).transpose(1, 2)
    kept = Draw(draw.order, draw.visible, torch.zeros_like(draw.drop), draw.t, draw.noise)
    batch = grouped(model, tokens, text_states, text_mask, size, kept)
    if isinstance(model, FlowDiT):
        return whole_error(model, batch).mean(dim=1)
    assert isinstance(model, DJEPA)
    text = model.encoder.text_in(batch.prompt)
    z = model.predict(text, batch.x[:, : batch.visible], batch.layout)
    return velocity_error(model, batch, z).mean(dim=1)

"""How many floating-point operations the networks take; a multiply and an add are two.

Matrix products only, as everyone counts for utilisation; norms, activations and rotations are
left out. Shapes: L text tokens, V visible and H hidden image tokens, K draws a token.
"""

from components.model.dit import FlowDiT, FlowDiTConfig
from components.model.djepa import DJEPA, DJEPAConfig
from components.model.network import Network, NetworkConfig
from components.model.sampler import SamplerConfig, cosine_step, guided_steps, head_evaluations


def block(config: NetworkConfig, tokens: float) -> float:
    """One two-stream block over `tokens` of both streams together."""
    linear = 2 * (4 + 2 * config.mlp_ratio) * config.width**2
    return tokens * linear + 4 * tokens**2 * config.width


def last_block(config: NetworkConfig, tokens: float, wanted: float) -> float:
    """The block whose text ends: only the `wanted` image tokens ask and go on."""
    width = config.width
    return (
        6 * width**2 * tokens
        + 4 * width * wanted * tokens
        + 2 * (1 + 2 * config.mlp_ratio) * width**2 * wanted
    )


def encoder(config: DJEPAConfig, text: float, image: float) -> float:
    """φ or φ̄ over embedded text and `image` tokens."""
    embedded = 2 * config.channels * config.width * image
    return embedded + config.encoder_blocks * block(config, text + image)


def predictor(config: DJEPAConfig, text: float, image: float, wanted: float) -> float:
    """γ over text and all `image` tokens, z of the `wanted`."""
    before = (config.predictor_blocks - 1) * block(config, text + image)
    return before + last_block(config, text + image, wanted)


def head_conditions(config: DJEPAConfig) -> float:
    """What of the flow head is computed once a token."""
    width = config.head_width
    return 2 * (config.width * width + config.head_blocks * 3 * width**2)


def head_velocity(config: DJEPAConfig) -> float:
    """What of the flow head is computed for each draw or evaluation of a token."""
    width = config.head_width
    return 2 * (2 * config.channels * width + config.head_blocks * 2 * width**2)


def text_input(config: NetworkConfig, text: float) -> float:
    """The projection of the frozen encoder's states."""
    return 2 * config.text_width * config.width * text


def train_image(
    network: Network, text: float, tokens: float, hidden: float, draws: int, jepa: bool
) -> float:
    """A training image, forward and backward; the target encoder forward only.

    A backward pass counts twice the forward one: nothing that is computed again is counted.
    """
    config = network.config
    text += config.buffer_tokens
    if isinstance(network, FlowDiT):
        return 3 * _whole(network.config, text, tokens)
    assert isinstance(network, DJEPA) and isinstance(config, DJEPAConfig)
    forward = (
        text_input(config, text)
        + encoder(config, text, tokens - hidden)
        + predictor(config, text, tokens, hidden)
        + hidden * (head_conditions(config) + draws * head_velocity(config))
        + draws * 2 * 5 * config.head_width**2  # the time's embedding, once a picture
    )
    if not jepa:
        return 3 * forward
    projected = hidden * 4 * config.width**2
    target = text_input(config, text) + encoder(config, text, tokens)
    return 3 * (forward + projected) + target


def drawn_picture(network: Network, text: float, tokens: int, sampler: SamplerConfig) -> float:
    """A picture drawn, the frozen encoders and the decoder left out."""
    steps = min(sampler.autoregressive_steps, tokens)
    total = _drawn(network, text, tokens, sampler, steps)
    # A dropped prompt is one token.
    guided = guided_steps(sampler, steps)
    return total + (_drawn(network, 1.0, tokens, sampler, guided) if guided else 0.0)


def _drawn(network: Network, text: float, tokens: int, sampler: SamplerConfig, steps: int) -> float:
    """The first `steps` autoregressive steps of one half of the guidance of a picture drawn."""
    config = network.config
    text += config.buffer_tokens
    total = text_input(config, text)
    if isinstance(network, FlowDiT):
        each = _whole(network.config, text, tokens) - total
        return total + sampler.num_inference_steps * each
    assert isinstance(network, DJEPA) and isinstance(config, DJEPAConfig)
    counts = cosine_step(sampler.autoregressive_steps, tokens)
    visible = 0
    evaluations = head_evaluations(sampler, len(counts))
    for drawn, asked in zip(counts[:steps], evaluations, strict=False):
        total += encoder(config, text, visible) + predictor(config, text, tokens, drawn)
        total += drawn * (head_conditions(config) + asked * head_velocity(config))
        visible += drawn
    return total


def _whole(config: NetworkConfig, text: float, tokens: float) -> float:
    """The baseline over all tokens of a picture, forward."""
    assert isinstance(config, FlowDiTConfig)
    return (
        text_input(config, text)
        + 4 * config.channels * config.width * tokens
        + (config.blocks - 1) * block(config, text + tokens)
        + last_block(config, text + tokens, tokens)
        + 2 * (2 + 6) * config.width**2
    )

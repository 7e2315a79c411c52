"""Layers of real models, and the work that a pass over one of them is."""

from __future__ import annotations

import dataclasses

BF16_BYTES = 2
F32_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer of routed experts.

    Attributes:
      name: what the tables call it.
      model: where the sizes come from.
      experts: E, experts of the layer.
      k: experts that each token is sent to.
      hidden: H, width of the residual stream.
      intermediate: I, width of an expert.
    """

    name: str
    model: str
    experts: int
    k: int
    hidden: int
    intermediate: int

    def __post_init__(self) -> None:
        for field in ("experts", "k", "hidden", "intermediate"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"shape {self.name}: {field} must be positive, got "
                    f"{getattr(self, field)}"
                )
        if self.k > self.experts:
            raise ValueError(
                f"shape {self.name}: each token needs {self.k} experts, got "
                f"{self.experts}"
            )

    @property
    def expert_values(self) -> int:
        """Base weights of one expert: gate, up and down."""
        return 3 * self.hidden * self.intermediate

    @property
    def weight_bytes(self) -> int:
        """All base weights in bfloat16."""
        return BF16_BYTES * self.experts * self.expert_values

    def lora_bytes(self, rank: int) -> int:
        """The six float32 LoRA arrays."""
        # Of each projection's A and B, one is as wide as H and the other as I.
        widths = 3 * (self.hidden + self.intermediate)
        return F32_BYTES * self.experts * rank * widths

    def capped(self, experts: int | None) -> Shape:
        """The same layer with at most this many experts, named so."""
        if experts is None or experts >= self.experts:
            return self
        name = f"{self.name}/E{experts}"
        return dataclasses.replace(self, name=name, experts=experts)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("S1", "Qwen3-30B-A3B", 128, 8, 2048, 768),
        Shape("S2", "DeepSeek-V2-Lite", 64, 6, 2048, 1408),
        Shape("olmoe", "OLMoE-1B-7B", 64, 8, 2048, 1024),
        Shape("mixtral", "Mixtral-8x7B", 8, 2, 4096, 14336),
        Shape("dsv3", "DeepSeek-V3", 256, 8, 7168, 2048),
    )
}

PASSES = ("forward", "lora", "train")


def flops(shape: Shape, tokens: int, pass_name: str) -> int:
    """Operations of the base GEMMs; a multiply-add is two.

    A slot (token, expert) multiplies with each weight of its expert once in the
    forward. The backward multiplies once more, for the gradient of the input; frozen
    weights have no gradient. LoRA, activations and recomputation do not count: they are
    cost, not work.
    """
    forward = 2 * tokens * shape.k * shape.expert_values
    return forward * _sweeps(pass_name)


def weight_traffic(expert_bytes: int, distinct_experts: float, pass_name: str) -> float:
    """Bytes of base weights that must be read: once per sweep and expert."""
    return expert_bytes * distinct_experts * _sweeps(pass_name)


def _sweeps(pass_name: str) -> int:
    if pass_name not in PASSES:
        raise ValueError(f"pass: expected one of {list(PASSES)}, got {pass_name!r}")
    return 2 if pass_name == "train" else 1


# Copies of the weights, in units of their bfloat16 bytes, that a process holds at its
# worst moment: ktjax the source beside the packed store; XLA float32 beside the
# bfloat16 source and a transposed projection; torch gate and up beside their
# concatenation.
COPIES = {"ktjax": 2.1, "xla": 3.7, "torch": 1.7}
# What packing may add to a store in another format.
STORE_PADDING = 1.1
# Activations, gradients, scratch and the interpreters.
HEADROOM_BYTES = 3 * 10**9


def memory_needed(
    shape: Shape, families: list[str], rank: int, stored: int = 0
) -> float:
    """Bytes that the processes of these contenders need together.

    Args:
      shape: the layer.
      families: a process each.
      rank: of the adapters.
      stored: bytes an expert of further stores, beside the one in bfloat16.
    """
    copies = sum(COPIES[family] for family in families)
    # Adapters and their gradients.
    lora = 2 * len(families) * shape.lora_bytes(rank)
    stores = STORE_PADDING * stored * shape.experts
    return copies * shape.weight_bytes + stores + lora + HEADROOM_BYTES


def available_memory() -> int:
    """Bytes that can be had without swapping, by `/proc/meminfo`."""
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable: Linux 3.14 or later needed")


def check_memory(
    shape: Shape, families: list[str], rank: int, available: int, stored: int = 0
) -> None:
    """Refuses what would not fit; arguments as `memory_needed`.

    Raises:
      MemoryError: with how much is needed and how many experts would fit.
    """
    needed = memory_needed(shape, families, rank, stored)
    if needed <= available:
        return
    fits = [
        experts
        for experts in range(shape.k, shape.experts)
        if memory_needed(shape.capped(experts), families, rank, stored) <= available
    ]
    cap = f"--experts {max(fits)} or fewer" if fits else "a smaller shape"
    holders = ", ".join(families) + (" in all formats" if stored else "")
    fewer = "--formats" if stored else "--peers"
    raise MemoryError(
        f"shape {shape.name} ({shape.model}, {shape.experts} experts) needs about "
        f"{needed / 1e9:.0f} GB for {holders}, and {available / 1e9:.0f} "
        f"GB are available: take {cap}, or fewer {fewer}"
    )

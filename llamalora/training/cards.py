"""The GPUs that the plans know: what their vendor says they hold, compute, read and exchange."""

from dataclasses import dataclass

REPORTED = 0.9856  # of the GB in a card's name (which are GiB), what it reports: 15.77 of 16
USABLE = 0.95  # of what it reports: the allocator wastes some, and a plan is no measurement
NETWORK = 25  # GB/s in each direction of a node with one InfiniBand adapter (HDR, 200 Gbit/s)


@dataclass(frozen=True)
class Card:
    """A GPU as NVIDIA's data sheet has it, in the form that stands on a board of its own (SXM), not in a PCIe slot.

    Attributes:
        memory: GB in its name.
        capability: its compute capability, the major version.
        teraflops: dense matrix products by precision, sums in fp32; in half precision those of the tensor cores.
        bandwidth: of its memory, GB/s.
        link: to the other GPUs of its machine, GB/s in each direction: NVLink, or PCIe where there is none.
        sheet: the source.
    """

    memory: int
    capability: int
    teraflops: dict[str, float]
    bandwidth: float
    link: float
    sheet: str

    @property
    def half(self) -> str:
        """The half precision in which it trains: bf16 where it has it."""
        return "bf16" if "bf16" in self.teraflops else "fp16"


def _both(half: float, fp32: float) -> dict[str, float]:
    return {"bf16": half, "fp16": half, "fp32": fp32}


_V100 = {"fp16": 125.0, "fp32": 15.7}
CARDS = {
    "V100-16": Card(16, 7, _V100, 900, 150, "NVIDIA V100 data sheet, SXM2"),
    "V100-32": Card(32, 7, _V100, 900, 150, "NVIDIA V100 data sheet, SXM2"),
    "RTX-4090": Card(24, 8, _both(165.2, 82.6), 1008, 32, "NVIDIA Ada GPU architecture, appendix A; PCIe 4"),
    "A100-40": Card(40, 8, _both(312, 19.5), 1555, 300, "NVIDIA A100 data sheet, SXM"),
    "A100-80": Card(80, 8, _both(312, 19.5), 2039, 300, "NVIDIA A100 data sheet, SXM"),
    "H100": Card(80, 9, _both(989, 67), 3350, 450, "NVIDIA H100 data sheet, SXM, without sparsity"),
    "H200": Card(141, 9, _both(989, 67), 4800, 450, "NVIDIA H200 data sheet, SXM, without sparsity"),
}
OTHER_FORMS = {"PCIE", "NVL", "MIG", "D"}  # in a name: slower than the namesake, or a part of it


def recognise(name: str, memory: int) -> str | None:
    """The card that goes by this name (`torch.cuda.get_device_name`) and reports so many bytes; None if none does."""
    words = set(name.upper().replace("-", " ").split())
    for card, figures in CARDS.items():
        series = {"RTX", "4090"} if card == "RTX-4090" else {card.split("-")[0]}
        if series <= words and not words & OTHER_FORMS and abs(memory / 2**30 / figures.memory - 1) < 0.1:
            return card
    return None

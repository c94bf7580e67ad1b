"""The dtype that the matrix products run in, and what a GPU must have and is told for them."""

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch

from ..errors import InputError
from .config import PRECISIONS

DTYPES = dict(zip(PRECISIONS, (torch.float32, torch.float16, torch.bfloat16), strict=True))


def choose_precision(requested: str, device: torch.device) -> tuple[str, str]:
    """`auto` -> what the device computes natively; returns the precision and why."""
    if requested != "auto":
        return requested, "requested"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", f"{name} computes bf16"
        return "fp16", f"{name} has no bf16"
    capabilities = torch.backends.cpu.get_cpu_capability()
    if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return "bf16", f"the CPU ({capabilities}) computes bf16"
    return "fp32", f"the CPU ({capabilities}) has no bf16 arithmetic"


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context of forward passes: parameters stay as they are, products run in `precision`."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


class PrecisionError(InputError):
    """A GPU for which the installed PyTorch has no kernels."""


def prepare_gpu(device: torch.device) -> None:
    """Chooses between kernels where PyTorch's own choice does not suit this model.

    Raises:
        PrecisionError: the installed PyTorch has none for this GPU.
    """
    if not torch.version.hip:
        _check_kernels(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    # cuDNN's attention plans anew for each shape, for up to a second, and nearly every micro-batch has one of its own
    torch.backends.cuda.enable_cudnn_sdp(False)
    # parts of a product in fp16 are summed in fp32: their sum may overflow where the product does not
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    # what torch tells its own developers: that a thread was new, that a kernel is compiled in another form
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA context")
    warnings.filterwarnings("ignore", r"\s*Online softmax is disabled on the fly")


def _check_kernels(name: str, capability: tuple[int, int]) -> None:
    built_for = torch.cuda.get_arch_list()
    if not built_for or any(_runs(kernel, capability) for kernel in built_for):
        return
    own = "sm_{}{}".format(*capability)
    if capability < min(_version(kernel) for kernel in built_for):
        wanted = (
            "too old for it; the build for CUDA 12.6 has kernels for a V100 (sm_70), too: pip install "
            f"torch=={torch.__version__.partition('+')[0]} --index-url https://download.pytorch.org/whl/cu126"
        )
    else:
        wanted = "too new for it; install a newer one"
    raise PrecisionError(
        f"PyTorch {torch.__version__} has kernels for {', '.join(built_for)}; this GPU ({name}, {own}) is {wanted}"
    )


def _runs(kernel: str, capability: tuple[int, int]) -> bool:
    """Whether sm_80, which runs on the same generation from there on, or compute_80, from there on, runs on a GPU."""
    version = _version(kernel)
    return version <= capability and (kernel.startswith("compute") or version[0] == capability[0])


def _version(kernel: str) -> tuple[int, int]:
    """sm_120a -> (12, 0)."""
    number = kernel.partition("_")[2].rstrip("af")
    return int(number[:-1]), int(number[-1])

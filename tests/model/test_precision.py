"""A GPU must have kernels in the PyTorch that is installed, and is told which of them to use."""

import pytest
import torch

from llamalora.model.precision import PrecisionError, prepare_gpu

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.fixture
def gpu(monkeypatch):
    def describe(capability: tuple[int, int], built_for: list[str]) -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
        monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
        return torch.device("cuda", 0)

    return describe


@pytest.mark.parametrize("capability, built_for", [
    ((7, 0), CUDA_12_6), ((7, 5), CUDA_13), ((8, 9), CUDA_13), ((9, 0), CUDA_13), ((12, 1), CUDA_13),
    ((13, 0), CUDA_13),  # translated by the driver from compute_120
    ((9, 0), ["sm_90a"]), ((9, 0), []),
], ids=str)  # fmt: skip
def test_a_gpu_that_there_are_kernels_for(gpu, capability, built_for):
    prepare_gpu(gpu(capability, built_for))


@pytest.mark.parametrize("capability, built_for, said", [
    ((7, 0), CUDA_13, r"Some GPU, sm_70\) is too old.*pip install torch==2.13.0 --index-url \S+/cu126$"),
    ((12, 0), CUDA_12_6, r"sm_50, sm_60.*Some GPU, sm_120\) is too new for it; install a newer one"),
], ids=["a V100 with the default wheel", "a newer GPU than the wheel"])  # fmt: skip
def test_one_that_there_are_none_for_is_refused(gpu, capability, built_for, said):
    with pytest.raises(PrecisionError, match=said):
        prepare_gpu(gpu(capability, built_for))


def test_kernels_that_plan_anew_or_sum_in_half_precision_are_off(gpu):
    matmul = torch.backends.cuda.matmul
    torch.backends.cuda.enable_cudnn_sdp(True)
    matmul.allow_fp16_reduced_precision_reduction = True
    prepare_gpu(gpu((9, 0), CUDA_13))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not matmul.allow_fp16_reduced_precision_reduction

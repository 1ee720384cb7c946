"""NDIF's model actor with its model on the CPU; everything else is NDIF's.

NDIF itself loads models on CUDA devices only. The weights' `requires_grad` is off, as there.
"""

from __future__ import annotations

import ray
import torch
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel

torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_: None
torch.accelerator.current_accelerator = lambda *_: None  # torch 2.6, which Debian has, raises an error instead


class OnCPU(SandboxModelDeployment):
    CACHEABLE = False

    def load_from_disk(self) -> HuggingFaceModel:
        model = HuggingFaceModel.from_model_key(self.model_key, dispatch=True, dtype=self.dtype_name, **self.kwargs)
        model._module.requires_grad_(False)
        return model


@ray.remote(num_cpus=1, max_restarts=-1)
class CPUModelActor(OnCPU):
    pass

"""Accelerators that are described, not there: their own compilers compile for them on any machine.

A platform is ``cpu``, ``h100``, ``h100:8`` (one node of eight), or the name of a TPU topology as
JAX writes it, such as ``v5p:2x2x1`` or ``v6e:2x2``. Nothing compiled here can be run.

TPUs need the package ``libtpu`` (140 MB), the H100 ``jax[cuda13]`` (4.6 GB), each best in an
environment of its own, since with one of them every ``import jax`` looks for a device.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

_TPU = re.compile(r"v\d+[a-z]*:\d+(x\d+)*")
_H100 = re.compile(r"h100(?::(\d+))?")
# What XLA wants to know of a device, as protobuf text: an H100 SXM with 80 GB.
_H100_DEVICE = """
  gpu_device_info {
    cuda_compute_capability { major: 9 minor: 0 }
    core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
    threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
    block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
    registers_per_block_limit: 65536 registers_per_core_limit: 65536
    shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
    shared_memory_per_core: 233472 l2_cache_size: 52428800
    device_memory_size: 84929347584 memory_bandwidth: 3352320000000
  }
  platform_name: "CUDA"
  runtime_version { major: 12 minor: 8 }
  dnn_version_info { major: 9 minor: 7 }
  device_description_str: "NVIDIA H100 80GB HBM3"
"""


class CompilerMissing(RuntimeError):
    """The compiler of a platform is not installed."""


class Chips(NamedTuple):
    """Devices to compile for.

    Attributes:
      platform: as it was asked for.
      devices: all of them.
      language: what JAX lowers to.
      options: of the compiler.
    """

    platform: str
    devices: Sequence[Any]
    language: str
    options: dict[str, Any]

    @property
    def family(self) -> str:
        """``"v5p"`` of ``"v5p:2x2x1"``, for the names of files."""
        return self.platform.partition(":")[0]

    def one(self) -> NamedSharding:
        """Everything on the first of them."""
        return NamedSharding(Mesh([self.devices[0]], "x"), P())

    def compile(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Compiles ``jax.jit(function, **options)`` for abstract arguments with shardings."""
        lowered = self.lower(function, *arguments, **options)
        return self.finish(lowered)

    def lower(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        traced = jax.jit(function, **options).trace(*arguments)
        return traced.lower(lowering_platforms=(self.language,))

    def finish(self, lowered: Any) -> Any:
        return lowered.compile(compiler_options=self.options or None)


def is_platform(name: str) -> bool:
    """Whether ``describe`` knows what this is."""
    return name == "cpu" or bool(_TPU.fullmatch(name) or _H100.fullmatch(name))


def prepare() -> None:
    """To be called before JAX starts: only described devices are wanted, and several at a time."""
    jax.config.update("jax_platforms", "cpu")  # else it looks for real ones, and complains
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no metadata server to ask
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # else a lock lets in one process
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")  # these two spare four lines of warnings
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def describe(platform: str) -> Chips:
    """The devices of a platform.

    Raises:
      CompilerMissing: if its compiler is not installed.
      ValueError: if there is no such platform.
    """
    if platform == "cpu":
        return Chips(platform, jax.devices("cpu"), "cpu", {})
    match = _H100.fullmatch(platform)
    if match:
        count = int(match[1] or 1)
        options = {"topology": f"1x{count}x1", "target_config": _H100_DEVICE}
        # Autotuning would run kernels.
        options = ("cuda", "", options, {"xla_gpu_autotune_level": 0}, "jax[cuda13]")
    elif _TPU.fullmatch(platform):
        options = ("tpu", platform, {}, {}, "libtpu")
    else:
        raise ValueError(
            f"no platform {platform!r}: name cpu, h100, h100:8 or a topology such as v5p:2x2x1."
        )
    language, name, described, compiler_options, package = options
    try:
        topology = topologies.get_topology_desc(platform=language, topology_name=name, **described)
    except Exception as error:  # JAX raises whatever its plugin does
        if _is_installed(package):
            raise ValueError(
                f"the compiler of {platform} knows no such topology: {error}"
            ) from error
        raise CompilerMissing(
            f"The compiler of {platform} is not installed. In an environment of its own: "
            f'pip install "{package}".'
        ) from error
    return Chips(platform, topology.devices, language, compiler_options)


def _is_installed(package: str) -> bool:
    names = ("jax-cuda13-plugin", "jax-cuda12-plugin") if "cuda" in package else (package,)
    return any(True for name in names for _ in metadata.distributions(name=name))

"""accelerate shards by FSDP on accelerators alone: `patch()` lets it do so on CPUs, by the same code, so that tests can see it."""

import functools

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def patch() -> None:
    plain = AcceleratorState.__init__

    @functools.wraps(plain)
    def init(self, *args, fsdp_plugin=None, **options):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init  # type: ignore[method-assign]

"""Graph passes, each a callable that can be used alone or inside torch's `PassManager`."""

from sbs_fx.passes.channel_groups import ChannelGroups, channel_groups
from sbs_fx.passes.trace import trace

__all__ = ["ChannelGroups", "channel_groups", "trace"]

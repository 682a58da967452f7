"""What tests.launch.warm imports once, for all commands: everything that a dispatcher or a zygote does."""

import gc

import train  # noqa: F401
from launch import agent, preflight  # noqa: F401
from tests.launch import warm  # noqa: F401
from tracking import page  # noqa: F401

gc.freeze()  # forks share these objects' pages until one writes to them: collections are to leave them alone

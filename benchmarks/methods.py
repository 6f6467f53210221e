"""Methods besides the timesteps (docs/acceleration.md), in their published settings but for networks of four blocks.

The second and the third block see fewer tokens; hidden states are taken after the first one.
"""

PLACE = {"tokens.start": 1, "tokens.tail": 1}
ROUTE = PLACE | {"tokens.method": "route"}
SPRINT = PLACE | {"tokens.method": "sprint", "tokens.rate": 0.75, "tokens.pattern": "cells"}
ALL_TOKENS = {"tokens.rate": 0.0}  # of SPRINT's second phase
MASK = PLACE | {"tokens.method": "mask", "tokens.rate": 0.3}
CELLS = ROUTE | {"tokens.pattern": "cells"}  # for DiG
DISPERSIVE = {"regularizer.dispersive": 0.5, "regularizer.dispersive_depth": 1}
_ALIGN = {"regularizer.align": 0.5, "regularizer.align_depth": 1}
SRA = _ALIGN | {"regularizer.align_teacher_depth": 3}
REPA = _ALIGN | {"regularizer.align_target": "features"}
IREPA = REPA | {"regularizer.align_head": "conv", "regularizer.align_spatial_norm": 0.8}
CONTRASTIVE = {"regularizer.contrastive": 0.05}  # of flows

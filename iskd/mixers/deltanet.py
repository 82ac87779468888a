"""DeltaNet (arXiv 2406.06484, section 3.3; the rule: arXiv 2102.11174): a new value replaces what its key finds.

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = K^-1/2 q_t^T S_t
    y_t = W_o RMSNorm_h(o_t)

with q and k of length 1 (`iskd.mixers.delta`, which says what the SiLU in front of them does to the copies). Copied: q,
k, v (key-value heads repeated, as each head has its own beta) and o. Fresh: beta, which starts at 1/2, the short
convolutions, which start as the identity, and the norm. It forgets only by replacing.
"""

from __future__ import annotations

from iskd.mixers.delta import DeltaMixer


class DeltaNet(DeltaMixer):
    """DeltaNet over inherited projections. Its state is [B, H, K, V], fp32, and the convolutions' last inputs.

    Arguments and errors as in `iskd.mixers.delta.DeltaMixer`.

    Source: arXiv 2406.06484; the rule: arXiv 2102.11174
    Needs: attention's q, k, v and o
    Costs: state of 4.8 MiB in SmolLM2-135M, time of a token 1.40 at a context of 8,192; attention has 360.0 and 1.89
        there (experiments/subquadratic-decode/README.md)
    Measured: 82.2 % of the teacher's accuracy, copied and aligned, in the grid on stories260K
        (experiments/subquadratic-stories/README.md)
    """

"""Adagrad with one number per row of a table."""

import torch

from reclm.run.each_weight import EachWeight


class RowwiseAdagrad(EachWeight):
    """Adagrad (Duchi et al. 2011) with one sum of squares per row of a table (V, D), as in recommenders of
    industry (DLRM, arXiv 1906.00091; fbgemm's exact row-wise Adagrad): 4 / D bytes of state per weight.

        s_i <- s_i + mean_j g_ij^2        w_ij <- w_ij - lr g_ij / (sqrt(s_i) + eps)

    Weight decay is decoupled, as in AdamW: w <- (1 - lr weight_decay) w."""

    def __init__(self, groups: list[dict], lr: float, eps: float = 1e-8):
        super().__init__(groups, {"lr": lr, "eps": eps, "weight_decay": 0.0})

    def update(self, weight: torch.Tensor, group: dict) -> None:
        state = self.state[weight]
        if not state:
            state["row_sum"] = weight.new_zeros(len(weight), 1)
        if weight.grad.is_sparse:
            return self.update_touched(weight, state["row_sum"], group)
        # Without a temporary of the size of the table.
        norms = torch.linalg.vector_norm(weight.grad, dim=1, keepdim=True)  # (V, 1)
        state["row_sum"].addcmul_(norms, norms, value=1 / weight.shape[1])
        rates = group["lr"] / (state["row_sum"].sqrt() + group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.addcmul_(weight.grad, rates, value=-1.0)

    def update_touched(self, weight: torch.Tensor, row_sum: torch.Tensor, group: dict) -> None:
        """The same for the rows of a sparse gradient alone: others would stay as they are, but for weight
        decay, which reaches a row when it is touched."""
        grad = weight.grad.coalesce()
        (rows,), grad = grad.indices(), grad.values()
        sums = row_sum[rows] + grad.square().mean(1, keepdim=True)
        row_sum[rows] = sums
        kept = weight[rows] * (1 - group["lr"] * group["weight_decay"])
        weight[rows] = kept - group["lr"] / (sums.sqrt() + group["eps"]) * grad

"""Focal losses, forward: no detector asks for them at inference, but validation losses do."""

import torch

_SMALLEST = torch.finfo(torch.float32).tiny


def sigmoid_focal_loss_forward(
    input: torch.Tensor,  # noqa: A002 - the compiled operator's name for it
    target: torch.Tensor,
    weight: torch.Tensor,
    output: torch.Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Focal loss of every class on its own (Lin et al. 2017, "Focal Loss for Dense Object Detection", eq. 5).

    Args:
        input: ``(N, C)`` logits.
        target: ``(N,)`` int64; C is background.
        weight: ``(C,)`` of the target's class, or empty; background has none, so targets must be below C then.
        output: ``(N, C)``, written.
        gamma: exponent of what is easy.
        alpha: weight of positives; 1 - alpha of negatives.
    """
    probability = input.float().sigmoid()
    classes = torch.arange(input.shape[1], device=input.device)
    positive = target[:, None] == classes[None, :]
    of_positive = alpha * (1 - probability) ** gamma * probability.clamp(min=_SMALLEST).log()
    of_negative = (1 - alpha) * probability**gamma * (1 - probability).clamp(min=_SMALLEST).log()
    loss = -torch.where(positive, of_positive, of_negative)
    output.copy_(loss * weight.float()[target][:, None] if weight.numel() else loss)


def softmax_focal_loss_forward(
    input: torch.Tensor,  # noqa: A002
    target: torch.Tensor,
    weight: torch.Tensor,
    output: torch.Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Focal loss of the target's probability.

    Args:
        input: ``(N, C)`` probabilities, already normalised over the classes.
        target: ``(N,)`` int64; negative is ignored.
        weight: ``(C,)`` of the target's class, or empty.
        output: ``(N,)``, written.
        gamma: exponent of what is easy.
        alpha: weight of all.
    """
    known = target.clamp(min=0)
    probability = input.float().gather(1, known[:, None])[:, 0]
    loss = -alpha * (1 - probability) ** gamma * probability.clamp(min=_SMALLEST).log()
    if weight.numel():
        loss = loss * weight.float()[known]
    output.copy_(loss.masked_fill(target < 0, 0.0))

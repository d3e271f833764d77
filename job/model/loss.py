"""The contrastive loss and what a person wants to know of a batch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_logits(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor) -> Tensor:
    """(B, B) scaled similarities in float32, images down, texts across. logit_scale: scalar > 0, not its logarithm."""
    return logit_scale * image_BD @ text_BD.T


def clip_loss(logits_BB: Tensor) -> Tensor:
    """Mean of the two cross-entropies over the B x B similarities. Source: CLIP, arXiv:2103.00020, Fig. 3.

    Not additive over micro-batches: every pair's negatives are the whole global batch. Equal captions need no special care:
    they have equal features, so the gradient is that of uniform targets over them.
    """
    labels = torch.arange(len(logits_BB), device=logits_BB.device)
    return (F.cross_entropy(logits_BB, labels) + F.cross_entropy(logits_BB.T, labels)) / 2


def batch_scores(logits_BB: Tensor, text_of_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How well the batch was matched: (image-to-text accuracy, text-to-image accuracy, probability of the right caption).

    Args: text_of_B: which distinct text each caption is; equal captions count as right for each other's images.
    Returns: three float32 scalars.
    """
    with torch.no_grad():
        same_BB = text_of_B[:, None] == text_of_B[None, :]
        image_to_text = same_BB.gather(1, logits_BB.argmax(dim=1, keepdim=True)).float().mean()
        text_to_image = same_BB.gather(0, logits_BB.argmax(dim=0, keepdim=True)).float().mean()
        probability = (logits_BB.softmax(dim=1) * same_BB).sum(dim=1).mean()
    return image_to_text, text_to_image, probability

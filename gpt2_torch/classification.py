"""GPT-2 with a head that classifies sequences, as transformers' `GPT2ForSequenceClassification`."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridge import GPT2Config, SequenceClassifier
from gpt2_torch.arrays import array_from_tensor, tensor_from_array
from gpt2_torch.loading import model_from_checkpoint
from gpt2_torch.model import GPT2


class GPT2ForSequenceClassification(nn.Module):
    """A GPT-2, and a matrix that maps the hidden state of the last token to the logits of the labels.

    Attributes:
        pad_token_id: the id of padding on either side of a sequence, or None if sequences are not padded.
    """

    def __init__(self, config: GPT2Config, num_labels: int, pad_token_id: int | None = None) -> None:
        super().__init__()
        self.transformer: GPT2 = GPT2(config)
        self.score: nn.Linear = nn.Linear(config.n_embd, num_labels, bias=False)
        self.pad_token_id = pad_token_id
        nn.init.normal_(self.score.weight, std=config.initializer_range)

    def forward(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B C"]:
        """Return the logits of the labels, from the last token of each row that is not padding.

        Raises `ValueError` for several rows without a `pad_token_id`, as transformers does.
        """
        B, T = input_ids.shape
        if self.pad_token_id is None:
            if B > 1:
                raise ValueError(
                    "several rows need a pad_token_id, because rows may have different lengths; set it in config.json"
                )
            last_B = torch.full((B,), T - 1, device=input_ids.device)
        else:
            is_token_BT = input_ids != self.pad_token_id
            last_B = (is_token_BT * torch.arange(T, device=input_ids.device)).argmax(-1)
        x_BTD = self.transformer.last_hidden_state(input_ids)
        return self.score(x_BTD[torch.arange(B, device=input_ids.device), last_B])


def model_from_classifier(classifier: SequenceClassifier) -> GPT2ForSequenceClassification:
    """Return a model with the classifier's tensors, in their dtypes and in eval mode."""
    with torch.device("meta"):  # allocates nothing, because the tensors are assigned next
        model = GPT2ForSequenceClassification(
            classifier.checkpoint.config, classifier.num_labels, classifier.pad_token_id
        )
    model.transformer = model_from_checkpoint(classifier.checkpoint)
    model.score.load_state_dict({"weight": tensor_from_array(classifier.score.read())}, assign=True)
    return model.eval()


def classifier_from_model(model: GPT2ForSequenceClassification, like: SequenceClassifier) -> SequenceClassifier:
    """Return the model as a classifier, which `bridge.save_classifier` writes. It shares the model's memory.

    Args:
        like: the classifier that the model was made from. Its tokenizer and labels are kept.
    """
    return like.with_torch({name: array_from_tensor(tensor) for name, tensor in model.state_dict().items()})

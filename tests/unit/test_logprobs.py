"""The head in chunks: the numbers of plain autograd, forward and backward."""

import pytest
import torch
from torch import nn

from ratchet.models import logprobs
from ratchet.models.logprobs import head_logprobs

ROWS, WIDTH, WORDS, WANTED = 40, 16, 50, 31


def run(monkeypatch, chunk_logits, temperature, *, is_frozen=False, keeps_logits=False):
    """Log-probabilities, and the gradients of hidden states and head under different slopes."""
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", chunk_logits)
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    head = nn.Linear(WIDTH, WORDS, bias=False).requires_grad_(not is_frozen)
    cells = torch.randperm(ROWS)[:WANTED].sort().values
    targets = torch.randint(0, WORDS, (WANTED,))
    found = head_logprobs(head, hidden, cells, targets, temperature, keeps_logits=keeps_logits)
    (found * torch.linspace(-2, 3, WANTED)).sum().backward()
    return found.detach(), hidden.grad, head.weight.grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows_at_once", [1, 8, 31])
def test_chunks_give_what_the_whole_gives(monkeypatch, temperature, rows_at_once):
    whole = run(monkeypatch, 10**9, temperature)
    chunks = run(monkeypatch, rows_at_once * WORDS, temperature)
    for expected, found in zip(whole, chunks, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_that_are_kept_change_no_bit(monkeypatch, temperature):
    again = run(monkeypatch, 8 * WORDS, temperature)
    kept = run(monkeypatch, 8 * WORDS, temperature, keeps_logits=True)
    assert all(torch.equal(one, two) for one, two in zip(again, kept, strict=True))


def test_a_frozen_head_gets_no_gradient_and_hands_on_that_of_the_hidden_states(monkeypatch):
    _, expected, _ = run(monkeypatch, 10**9, 1.0, is_frozen=True)
    _, found, head = run(monkeypatch, 8 * WORDS, 1.0, is_frozen=True)
    assert head is None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_head_of_two_words_worked_by_hand(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 2)
    head = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0], [1.0]]))
    hidden = torch.tensor([[0.0], [float(torch.tensor(3.0).log())]], requires_grad=True)
    # The second row has logits 0 and ln 3: probabilities 1/4 and 3/4.
    found = head_logprobs(head, hidden, torch.tensor([1]), torch.tensor([1]), 1.0)
    torch.testing.assert_close(found, torch.tensor([0.75]).log())
    found.sum().backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.0], [0.25]]))

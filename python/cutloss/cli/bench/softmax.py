"""Generated embeddings, classifier and targets whose softmax is like that of a language model.

With random inputs no probability stands out, so a method that leaves small ones out looks as if it
were exact and free. Here the mean probability by rank is that of a small model (6 layers, D 1536, V
131072) on text that it has not seen: CURVE. Three parts make up a row of logits:

* how frequent each token is: a power law of its index, of a weight that differs by row;
* noise, nearly the same for all rows of a passage, of a size that differs by row;
* CANDIDATES tokens that the row likes, the first one most, out of those that its passage is about;
  rows differ in how sure they are.

Targets are drawn from a disturbed softmax, as text that the model has not seen would be. Probable
tokens lie together as in text: at the model's sizes, of the blocks of 128 rows and 256 tokens 29 %
hold a probability over 2^-12 (33 % did with the model). With a small D there are more of them.
"""

import torch

# rank: mean probability, measured
CURVE = {1: 0.36, 2: 0.085, 10: 8e-3, 100: 5.6e-4, 1000: 3.4e-5, 4096: 5.8e-6}
NLL = 4.4  # mean over the rows, measured

CANDIDATES = 32
PASSAGE = 128  # rows
# Fitted to CURVE by hand.
_TOPIC = 160  # tokens that a passage is about
_POWER, _OFFSET, _SCATTER = 1.25, 8.0, 0.2  # of the frequencies
_NOISE = 1.1  # its deviation in a row's logits
_SHARED = 0.95  # of it, the passage's part
_LEAST_SURE, _SUREST = -1.0, 10.5  # what the first candidate's logit gains
_FALL = 1.1  # of that gain with the logarithm of the candidate's rank
_SURPRISE = 1.0  # deviation of the disturbance of the softmax that targets are drawn from
_ROWS = 512  # of logits at a time


def generate(N, D, V, device="cpu", seed=0):
    """E (N,D), C (V,D) in fp32, targets (N). D is at least 2."""
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, device=device, generator=random)

    def around_one(spread):  # (N,1)
        return 1 + spread * (2 * torch.rand(N, 1, device=device, generator=random) - 1)

    frequency = -_POWER * (torch.arange(V, device=device) + _OFFSET).log() + _SCATTER * normal(V)
    frequency -= frequency.mean()
    c = normal(V, D).mul_(D**-0.5)  # (V,D)
    c[:, 0] = 0.25 * frequency
    passage = torch.arange(N, device=device) // PASSAGE  # (N)
    passages = -(-N // PASSAGE)
    e = normal(passages, D).mul_(_SHARED)[passage]  # (N,D)
    e += normal(N, D).mul_((1 - _SHARED**2) ** 0.5)
    e *= _NOISE * around_one(0.5)
    e[:, :1] = 4 * around_one(0.3)

    likely = (0.6 * frequency).softmax(0)
    topic = torch.multinomial(likely, passages * _TOPIC, replacement=True, generator=random)
    chosen = torch.randint(_TOPIC, (N, CANDIDATES), device=device, generator=random)
    liked = topic.view(passages, _TOPIC)[passage].gather(1, chosen)  # (N,CANDIDATES)
    sure = torch.rand(N, 1, device=device, generator=random) * (_SUREST - _LEAST_SURE) + _LEAST_SURE
    order = torch.arange(1, CANDIDATES + 1, device=device).log()
    fall = _FALL * (1 + torch.rand(N, 1, device=device, generator=random))
    gain = sure - fall * order + 0.8 * normal(N, CANDIDATES)
    rarity = (frequency.max() - 3 - frequency[liked]).clamp_(min=0)
    gain = torch.where(gain > 0, gain + 0.6 * rarity, 0.0)  # a rare token must gain more to matter
    for i in range(CANDIDATES):
        direction = c[liked[:, i]]  # (N,D)
        direction[:, 0] = 0
        e += direction * (gain[:, i : i + 1] / direction.square().sum(1, keepdim=True))
    return e, c, _targets(e, c, _SURPRISE * normal(V), random)


def _targets(e, c, disturbance, random):
    targets = torch.empty(len(e), dtype=torch.int64, device=e.device)
    for n in range(0, len(e), _ROWS):
        p = (e[n : n + _ROWS] @ c.t() + disturbance).softmax(1)
        targets[n : n + _ROWS] = torch.multinomial(p, 1, generator=random).squeeze(1)
    return targets


def look(e, c, targets, ranks=CURVE, rows=256):
    """(mean nll, {rank: mean probability}) of some rows, evenly spaced."""
    chosen = torch.arange(0, len(e), max(1, len(e) // rows), device=e.device)
    targets = targets[chosen]
    log_p = (e[chosen].float() @ c.float().t()).log_softmax(1)
    valid = targets >= 0
    nll = -log_p[valid].gather(1, targets[valid, None]).mean().item()
    top = log_p.topk(min(max(ranks), c.shape[0]), dim=1).values.exp().mean(0)
    return nll, {rank: top[rank - 1].item() for rank in ranks if rank <= len(top)}


def describe(e, c, targets):
    nll, found = look(e, c, targets)
    curve = ", ".join(f"{rank}: {p:.1e} ({CURVE[rank]:.1e})" for rank, p in found.items())
    return (
        f"data softmax: generated, fitted to a trained model's curve (its values at V 131072 in "
        f"brackets): mean nll {nll:.2f} ({NLL}), mean probability by rank {curve}"
    )

"""Prints what is read of tensors whose values the host knows, and of those that it does not."""

from __future__ import annotations

import torch

CARD = torch.device("cuda")


def main() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).to(CARD)
    print(bool(mask.bool().all()), bool(mask[1].all()), mask.sum(1).max().item())
    print(mask.nonzero().tolist()[-1], mask[mask.bool()].shape, torch.equal(mask, mask.clone()))
    places = torch.arange(3, device=CARD)[None] + 2
    print(torch.diff(places, prepend=places[:, :1] - 1).ne(1).cumsum(-1).tolist())
    print(torch.full((2,), 0.5, device=CARD).half().tolist(), (1 - mask).sum().item())
    # No kernel has computed the noise, but one side can decide what is true.
    noise = torch.rand(3, device=CARD) > 0.5
    done = torch.full((3,), True, device=CARD)
    print((noise | done).all().item(), (noise & ~done).any().item(), noise.any().item())
    loss = torch.rand(4, device=CARD).mean()
    print(bool(torch.isfinite(loss)), bool(torch.isnan(loss)), bool(torch.isinf(loss)))
    # What a kernel has written over is not known any more.
    mask.copy_(torch.randint(9, (2, 3), device=CARD))
    print(mask.max().item())
    print((torch.ones(3, dtype=torch.bfloat16) + 0.1)[0].item(), torch.tensor(1.0) + 1)
    try:
        torch.ones(3 << 30, dtype=torch.int8, device=CARD).eq(torch.zeros(3, 1, device=CARD))
    except torch.OutOfMemoryError:
        print("out of memory")


if __name__ == "__main__":
    main()

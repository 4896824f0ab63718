"""The steps of a detector's training."""

from contextlib import nullcontext
from typing import Any

import torch
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from training.distributed import Processes
from training.seeds import Batches, Seeded, seed

from simam.zoo import UserError

from .recipes import Recipe


class Trainer:
    """A detector in training: what changes from step to step, and how.

    Args:
        model (nn.Module): a detector of torchvision, on its device.
        recipe (Recipe): the numbers.
        processes (Processes): that train together.
        data (Dataset): images and targets.
        batches (Batches): in which order.
        amp (str): "none", or the dtype of what autocast computes.
        workers (int): processes that read images.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        processes: Processes,
        data: Dataset,
        batches: Batches,
        *,
        amp: str = "none",
        workers: int = 0,
    ) -> None:
        self.model, self.recipe, self.processes, self.batches = model, recipe, processes, batches
        self.amp = None if amp == "none" else getattr(torch, amp)
        self.step = 0
        self.optimizer = torch.optim.SGD(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=recipe.rate(0, batches.steps),
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=amp == "float16")
        self.loader = DataLoader(
            Seeded(data, batches.number),
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=list,
        )
        self.parallel = DistributedDataParallel(model) if processes.size > 1 else model

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.model.load_state_dict(state["state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]

    def epoch(self) -> dict[str, float]:
        """Train for one epoch.

        Returns:
            dict of str to float: mean losses; "loss" is their sum, which is what falls.

        Raises:
            UserError: the loss is no number any more.
        """
        self.parallel.train()
        steps, parts = self.batches.steps, self.batches.accumulate
        self.batches.epoch = number = self.step // steps
        sums: dict[str, Tensor] = {}
        turns = iter(self.loader)
        quiet = None if self.processes.first else True  # none: unless there is no terminal
        for _ in tqdm(range(steps), f"epoch {number + 1}", leave=False, disable=quiet):
            rate = self.recipe.rate(self.step, steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            for turn in range(parts):
                for name, loss in self._turn(next(turns), turn).items():
                    sums[name] = sums.get(name, 0) + loss.double()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.step += 1
        if self.processes.size > 1:  # each has seen other images; the first one's are kept
            distribute_bn(self.model, self.processes.size)
        values = self.processes.total(torch.stack(list(sums.values())))
        values = values / (steps * parts * self.processes.size)
        return dict(zip(sums, values.tolist(), strict=True))

    def _turn(self, examples: list[tuple[Tensor, dict[str, Tensor]]], turn: int) -> dict[str, Any]:
        """Add the gradients of a part of a batch; its losses."""
        device, parts, size = self.processes.device, self.batches.accumulate, self.processes.size
        images = [image.to(device) for image, _ in examples]
        targets = [{name: t.to(device) for name, t in target.items()} for _, target in examples]
        # A detector learns from regions that it draws among many.
        seed(self.batches.number, self.step, turn * size + self.processes.rank)
        waits = size > 1 and turn < parts - 1
        with self.parallel.no_sync() if waits else nullcontext():
            with torch.autocast(device.type, self.amp, enabled=self.amp is not None):
                losses = self.parallel(images, targets)
                loss = sum(losses.values())
            if not loss.isfinite():
                each = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
                raise UserError(
                    f"the loss is {loss.item()} at step {self.step} ({each}); lower --lr, or "
                    "train with --amp none or bfloat16"
                )
            self.scaler.scale(loss / parts).backward()
        return {"loss": loss.detach()} | {name: value.detach() for name, value in losses.items()}

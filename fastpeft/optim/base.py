"""What the optimizers of this package share: everything but how state is kept.

A step is a handful of launches over lists of tensors (`fastpeft.ops.adamw`), which are made once and used as long as
the same parameters have gradients (`plan`). Before anything is changed, every parameter and gradient of every group is
checked, so that a step that raises has updated nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft.ops.adamw import AdamWControl, adamw_gradient_norm_at
from fastpeft.optim import formats
from fastpeft.optim.formats import Moments, Saved
from fastpeft.optim.options import check_arguments, check_group, rate
from fastpeft.optim.parameter import Entry, make_entry
from fastpeft.optim.plan import Batch, Plan, draft


class AdamWBase(torch.optim.Optimizer):
    """AdamW over lists of tensors; a subclass says how a parameter's moments are kept.

    Args:
        params: tensors, named tensors, or parameter groups.
        defaults: options that groups do not give themselves.
        amsgrad: as in torch; refused when true.
        differentiable: as in torch; refused when true.
        stochastic_rounding: round bfloat16 parameters up or down at random.
        max_grad_norm: norm that the gradients of all parameters together are scaled down to.
        seed: of the random rounding.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler gives grad_scale and found_inf instead of unscaling
    _bitsandbytes_names = False  # of the state in state dicts
    _own_options: tuple[str, ...] = ("max_grad_norm", "stochastic_rounding", "seed")  # that are no group's

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        amsgrad: bool,
        differentiable: bool,
        stochastic_rounding: bool,
        max_grad_norm: float | None,
        seed: int,
    ) -> None:
        self._name = type(self).__name__
        check_arguments(self._name, amsgrad, differentiable, max_grad_norm)
        check_group(self._name, defaults)
        self.max_grad_norm = max_grad_norm
        self.stochastic_rounding = stochastic_rounding
        self.seed = seed
        self._reset()
        super().__init__(params, defaults)
        self.register_state_dict_post_hook(_export, prepend=True)

    def _reset(self) -> None:
        """Forget what is made of parameters and state."""
        self._entries: list[Entry] = []
        self._plan: Plan | None = None
        self._captured: list[Plan] = []  # graphs know addresses alone, of tables that must live as long as they do
        self._controls: dict[torch.device, AdamWControl] = {}  # of steps that measure the norm
        self._plain_controls: dict[torch.device, AdamWControl] = {}  # of steps that do not; never written

    # How moments are kept, for a subclass to say.

    def _create_state(self, entries: Sequence[Entry]) -> None:
        """Make state of zeros for parameters of one device that have none."""
        raise NotImplementedError

    def _load_state(self, entry: Entry, saved: Saved) -> None:
        """Fill a parameter's state, which exists."""
        raise NotImplementedError

    def _moments(self, entry: Entry) -> Moments:
        """A parameter's moments, to be read: the state itself, or a copy of it."""
        raise NotImplementedError

    def _batches(self, plan: Plan) -> list[Batch]:
        """Divide the parameters of a plan into those that one launch takes."""
        raise NotImplementedError

    # Parameters.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as in torch; they are checked at once.

        Raises:
            ValueError: an option out of range, or a parameter that no kernel takes; no group was added.
        """
        index = len(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[index]
        try:
            check_group(self._name, group, index)
            first = len(self._entries)
            made = [make_entry(self._name, group, index, place, first + place) for place in range(len(group["params"]))]
            if self.max_grad_norm is not None:
                _check_norm(self._name, [*self._entries, *made])
        except ValueError:
            del self.param_groups[index]
            raise
        self._entries += made
        self._plan = None

    # Stepping.

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of the gradients at the last step that measured it, unscaled, before clipping; on the device.

        A step measures it where ``max_grad_norm`` is set, or a ``torch.amp.GradScaler`` takes part. None before.
        """
        return next((control.grad_norm for control in self._controls.values()), None)

    @property
    def skipped_steps(self) -> int:
        """How many steps changed nothing because a gradient was not finite; waits for the device."""
        return max((int(control.skipped) for control in self._controls.values()), default=0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.
        Returns:
            What ``closure`` returns, if it is given.
        Raises:
            ValueError: a parameter, a gradient or an option that cannot be taken; nothing was updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            check_group(self._name, group, index)
        plan = self._plan_step()
        if plan.entries:
            self._launch(plan, self._measure_norm(plan))
            plan.release()
        return loss

    def _plan_step(self) -> Plan:
        """The plan of this step, with its gradients; everything is checked, and nothing changed but state made."""
        if _is_capturing(self._entries):
            return self._plan_for_graph()
        plan = self._plan
        if plan is not None and plan.states == len(self.state) and plan.take_gradients(self._name):
            return plan
        plan = self._draft()
        self._create_missing_state(plan.entries)
        plan.set_batches(self._batches(plan), len(self.state))
        self._plan = plan
        return plan

    def _plan_for_graph(self) -> Plan:
        """A plan of the graph's own, which no later step writes to."""
        plan = self._draft()
        new = next((entry for entry in plan.entries if not self.state.get(entry.param)), None)
        if new is not None:
            raise RuntimeError(
                f"{self._name}: {new.name} has no state yet, and a graph would make it anew at every replay; call "
                "step() once with these parameters before capturing"
            )
        plan.set_batches(self._batches(plan), len(self.state))
        self._captured.append(plan)
        return plan

    def _draft(self) -> Plan:
        plan = draft(self._name, self._entries)
        if not plan.take_gradients(self._name):
            raise RuntimeError(f"{self._name}: gradients changed while a step was looking at them")
        return plan

    def _measure_norm(self, plan: Plan) -> Mapping[torch.device, AdamWControl]:
        """Measure the norm if it is asked for; the controls that the step goes by."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self.max_grad_norm is None and grad_scale is None and found_inf is None:
            return _controls(self._plain_controls, plan.norms)
        controls = _controls(self._controls, plan.norms)
        for device, norm in plan.norms.items():
            adamw_gradient_norm_at(
                [[plan.addresses[place] for place in places] for places in norm.members],
                norm.numels,
                norm.dtypes,
                controls[device],
                max_norm=self.max_grad_norm,
                grad_scale=_scalar(grad_scale, device),
                found_inf=_scalar(found_inf, device),
            )
        return controls

    def _launch(self, plan: Plan, controls: Mapping[torch.device, AdamWControl]) -> None:
        for batch in plan.batches:
            self._step_batch(batch, controls[batch.device])

    def _step_batch(self, batch: Batch, control: AdamWControl) -> None:
        group = self.param_groups[batch.group]
        beta1, beta2 = group["betas"]
        batch.rows.step_at(
            batch.addresses,
            batch.grad_dtype,
            control,
            lr=rate(group, batch.device),
            betas=(float(beta1), float(beta2)),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            maximize=group["maximize"],
            stochastic_rounding=self.stochastic_rounding and batch.rows.params[0].dtype == torch.bfloat16,
            seed=self.seed,
        )

    def _create_missing_state(self, entries: Sequence[Entry]) -> None:
        new: dict[torch.device, list[Entry]] = {}
        for entry in entries:
            if not self.state.get(entry.param):
                new.setdefault(entry.device, []).append(entry)
        for of_device in new.values():
            self._create_state(of_device)

    # State dicts.

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore options and state, of this class, of ``torch.optim.AdamW`` or of bitsandbytes' AdamW of any bits.

        Args:
            state_dict: what ``state_dict()`` of one of them gave; it is not kept and not changed.
        Raises:
            ValueError: groups or parameters of other sizes, missing keys, or options out of range; the message names
                the parameter, and nothing was changed.
        """
        given = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            given = hook(self, given) or given
        groups = self._read_groups(given["param_groups"])
        keys = [key for group in given["param_groups"] for key in group["params"]]
        saved = {
            entry: formats.read(given["state"][key], entry.shape, f"{self._name}: {entry.name}")
            for key, entry in zip(keys, self._entries, strict=True)
            if given["state"].get(key)
        }
        for entry in self._entries:
            if entry not in saved:
                self.state.pop(entry.param, None)
        self._create_missing_state(list(saved))
        for entry, of_entry in saved.items():
            self._load_state(entry, of_entry)
            self.state[entry.param]["step"].fill_(of_entry.step)
        for group, loaded in zip(self.param_groups, groups, strict=True):
            group.clear()
            group.update(loaded)
        self._plan = None
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _read_groups(self, saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        if len(saved) != len(self.param_groups):
            raise ValueError(
                f"{self._name}: the state dict has {len(saved)} parameter groups and the optimizer "
                f"{len(self.param_groups)}"
            )
        groups = []
        for index, (old, new) in enumerate(zip(self.param_groups, saved, strict=True)):
            if len(old["params"]) != len(new["params"]):
                raise ValueError(
                    f"{self._name}: group {index} of the state dict has {len(new['params'])} parameters and that of "
                    f"the optimizer {len(old['params'])}"
                )
            names = {"param_names": old["param_names"]} if "param_names" in old else {}
            options = {key: _copied(value) for key, value in new.items() if key != "params"}
            group = {**self.defaults, **names, **options, "params": old["params"]}
            check_group(f"{self._name}: the state dict", group, index)
            groups.append(group)
        return groups

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and copied: options and state, not the lists made of them."""
        state: dict[str, Any] = super().__getstate__()
        return {**state, **{name: self.__dict__[name] for name in self._own_options if name in self.__dict__}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on from a copy."""
        super().__setstate__(state)
        self._name = type(self).__name__
        self._reset()
        for index, group in enumerate(self.param_groups):
            for place in range(len(group["params"])):
                self._entries.append(make_entry(self._name, group, index, place, len(self._entries)))
        if not any(hook is _export for hook in self._optimizer_state_dict_post_hooks.values()):
            self.register_state_dict_post_hook(_export, prepend=True)


def _export(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Put the state into the layout of torch or bitsandbytes: what every ``state_dict()`` here goes through."""
    assert isinstance(optimizer, AdamWBase)
    entries = [entry for entry in optimizer._entries if optimizer.state.get(entry.param)]
    steps = _on_cpu([optimizer.state[entry.param]["step"] for entry in entries])
    state = {}
    for entry, step in zip(entries, steps, strict=True):
        exported = formats.write(step, optimizer._moments(entry), entry.shape, optimizer._bitsandbytes_names)
        if entry.distributed and not optimizer._bitsandbytes_names:
            exported = {key: _like(entry.param, value) for key, value in exported.items()}
        state[entry.number] = exported
    return {**state_dict, "state": state}


def _on_cpu(scalars: Sequence[Tensor]) -> list[Tensor]:
    """Scalars, each a tensor of its own on the CPU, with one transfer from each device."""
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for place, scalar in enumerate(scalars):
        by_device[scalar.device].append(place)
    out = list(scalars)
    for places in by_device.values():
        for place, value in zip(places, torch.stack([scalars[place] for place in places]).tolist(), strict=True):
            out[place] = torch.tensor(value, dtype=torch.float32)
    return out


def _like(param: Any, value: Tensor) -> Tensor:
    """A local part as a DTensor with the placement of its parameter; scalars as they are."""
    if value.dim() == 0:
        return value
    made: Tensor = type(param).from_local(
        value, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )
    return made


def _controls(made: dict[torch.device, AdamWControl], devices: Iterable[torch.device]) -> dict[Any, AdamWControl]:
    for device in devices:
        if device not in made:
            made[device] = AdamWControl(device)
    return made


def _scalar(value: Tensor | float | None, device: torch.device) -> Tensor | None:
    if value is None:
        return None
    return torch.as_tensor(value, dtype=torch.float32, device=device).reshape(())


def _check_norm(optimizer: str, entries: Sequence[Entry]) -> None:
    """The norm is measured by each device and process over what it has; refuse where that is not all."""
    devices = {entry.device for entry in entries}
    if len(devices) > 1:
        raise ValueError(
            f"{optimizer}: max_grad_norm with parameters on {' and '.join(sorted(map(str, devices)))}; the norm is "
            "measured on one device; clip with torch.nn.utils.clip_grad_norm_ instead"
        )
    split = next((entry for entry in entries if entry.distributed), None)
    if split is not None:
        raise ValueError(
            f"{optimizer}: max_grad_norm with {split.name}, a DTensor; each process would clip by the norm of its own "
            "part; clip with torch.nn.utils.clip_grad_norm_ instead"
        )


def _is_capturing(entries: Sequence[Entry]) -> bool:
    return any(entry.device.type == "cuda" for entry in entries[:1]) and torch.cuda.is_current_stream_capturing()


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value

"""Puts a routed layer at every place of a model; everything else of an adapter's life is stock peft."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn

from ..config.config import MoeConfig
from ..config.patterns import check_patterns
from ..forward.find import find_trackers
from ..forward.layout import turns_before
from ..forward.replicas import is_split
from ..forward.tracker import ForwardTracker
from ..layers import LAYERS, RoutedLayer, joined_places
from ..messages import warn
from ..places.hidden import choose_places
from .checks import check_groups, check_leftovers, check_neighbours, check_tensors, whole_embeddings
from .further_modules import check_further_modules
from .incoming import check_incoming, current, embedding_names
from .merging import Merge, check_merges, merge_layers, plan_merges, quiet_merging
from .mixed_rows import check_row_names, give_row_names, known_adapters
from .names import check_form, check_parts
from .router_outputs import record_router_outputs
from .saving import own_tensors, unwrapped
from .tensors import PEFT_PREFIX, named_tensors, plain_name, planned_tensors
from .tracking import detach_unused, refuse_in_use, tracker_around
from .transaction import unchanged_on_error

COMPILED = "_orig_mod."


class RoutedTuner(BaseTuner):
    """Base of the tuner of every routed adapter type; a subclass sets `prefix`."""

    tuner_layer_cls = RoutedLayer
    target_module_mapping = {}  # noqa: RUF012, peft declares it so

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        with _as_before(model):
            check_form(adapter_name)
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter into the model, or leave everything as it is; arguments as in peft.

        Patterns are tried first, as peft tries them on all names at once.

        Raises:
            ValueError: The adapter does not fit the model, its other adapters, or the weights that are to be loaded.
        """
        check_form(adapter_name)
        given: Any = self.peft_config[adapter_name]
        check_patterns(given, dict(model.named_modules()))
        with unchanged_on_error(self, given, *find_trackers(model)):
            # Places and sizes of this model go into a copy: the configuration may serve another model as well.
            self.peft_config[adapter_name] = resolved = copy(given)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            given.modules_to_save = resolved.modules_to_save  # PeftModel reads it from the one that it was given

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, so that its hooks run, which peft 0.20 would pass by."""
        return self.model(*args, **kwargs)

    def _prepare_adapter_config(self, peft_config: MoeConfig, model_config: dict) -> MoeConfig:  # type: ignore[override]
        # Places are chosen in _prepare_model, which is given the model.
        return peft_config

    def _prepare_model(self, peft_config: MoeConfig, model: nn.Module) -> None:  # type: ignore[override]
        """Resolve and check all places, then let the model tell the layers what a forward pass knows."""
        peft_config.recheck()
        check_further_modules(peft_config, model)
        places = choose_places(model, peft_config, **get_quantization_kwargs(model))
        # peft strips the prefix of a compiled model from the names it takes from saved tensors.
        self._places = {place.name.removeprefix(COMPILED): place for place in places}
        newest_first = reversed(self.peft_config.items())
        adapter_name = next((name for name, config in newest_first if config is peft_config), None)
        check_neighbours(peft_config, self.prefix, places, model)
        check_groups(peft_config, places, model)
        tensors = planned_tensors(peft_config, self.prefix, places)
        if adapter_name is not None:
            check_parts(adapter_name, tensors, others=[name for name in self.peft_config if name != adapter_name])
            check_leftovers(peft_config, adapter_name, self.prefix, places, model)
            incoming = current(adapter_name)
            if incoming is not None:
                check_incoming(incoming, peft_config, self.prefix, tensors, model)
        if peft_config.placement != "linear":
            record_router_outputs(model)
        tracker = tracker_around(model, self._places)
        if tracker is None:
            tracker = ForwardTracker(joined_places)
            tracker.attach(model)
        self._tracker = tracker
        if adapter_name is not None and is_split(model):
            tracker.late[adapter_name] = None
        for column, groups in peft_config.group_columns.items():
            tracker.group_columns[column] = tracker.group_columns.get(column, frozenset()) | groups

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: MoeConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        if parameter_name is not None:
            raise ValueError(f"{parameter_name}: routed adapters wrap modules, not parameters; use target_modules.")
        place = self._places.get(current_key.removeprefix(COMPILED))
        if place is None:
            raise ValueError(
                f"{current_key} is not among the places of {type(peft_config).__name__}, {sorted(self._places)}."
            )
        parts = peft_config.at(place).build(place)
        if isinstance(target, RoutedLayer) and target.prefix == self.prefix:
            target.update_layer(adapter_name, parts, inference_mode=peft_config.inference_mode)
            return
        layer = LAYERS[peft_config.placement_at(place)](
            target,
            adapter_name,
            parts=parts,
            prefix=self.prefix,
            place=place,
            tracker=self._tracker,
            quantization=get_quantization_kwargs(self.model),
            inference_mode=peft_config.inference_mode,
        )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        if turns_before(type(parent), target_name):
            self._tracker.turning.add(place.name)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # The layer puts its adapters on the base layer's device itself; peft's version also moves meta tensors of
        # 8-bit layers, and reads a weight that not every wrapped module has.
        setattr(parent, child_name, new_module)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; where no other was active, the first that is left becomes so.

        Args:
            adapter_name: Its name.

        Raises:
            ValueError: There is no such adapter, or it is merged.
            RuntimeError: Another thread is inside a forward of the model.
        """
        refuse_in_use(self.model, "delete_adapter")
        super().delete_adapter(adapter_name)

    def _checked_plan(self, adapter_names: list[str] | None, safe_merge: bool, prefix: str | None) -> list[Merge]:
        """What a merge has to do, after every reason against it has been looked for."""
        self._check_merge_allowed()
        plan = plan_merges(self.model, adapter_names, prefix, list(self.peft_config))
        check_merges(self.model, plan, safe_merge)
        return plan

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters, as in peft.

        Raises:
            RuntimeError: Another thread is inside a forward of the model.
        """
        refuse_in_use(self.model, "set_adapter")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def disable_adapter_layers(self) -> None:
        """Disable all adapters, as in peft.

        Raises:
            RuntimeError: Another thread is inside a forward of the model.
        """
        refuse_in_use(self.model, "Disabling adapters")
        super().disable_adapter_layers()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge mergeable adapters of this type into the base weights; arguments as in peft.

        Adapters that are active and not merged go on acting, as do those of other types.

        Raises:
            TypeError: `adapter_names` is no list of names.
            ValueError: An adapter is unknown or depends on its input, or a layer cannot merge it; nothing has been
                changed.
        """
        refuse_in_use(self.model, "merge_adapter")
        plan = self._checked_plan(adapter_names, safe_merge, self.prefix)
        if not plan:
            warn("All adapters are already merged, nothing to do.")
        merge_layers(plan, safe_merge)

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        refuse_in_use(self.model, "merge_and_unload" if merge else "unload")
        if merge:
            # The layers of all types come off, so what they do is merged as well.
            merge_layers(self._checked_plan(adapter_names, safe_merge, prefix=None), safe_merge)
            adapter_names = []
        with quiet_merging():
            # peft annotates None, but returns the model.
            model: nn.Module = super()._unload_and_optionally_merge(  # type: ignore
                merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )
        detach_unused(model)
        return model

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse peft's combination of adapters, which is defined for LoRA alone.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "add_weighted_adapter combines plain LoRA matrices; routed adapters have none. Activate several "
            "adapters at once with model.base_model.set_adapter([...]), which adds up their outputs."
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Give the layers the adapter of each row, for one forward or generate call of this thread."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        names = check_row_names(adapter_names, known_adapters(self.model), args, kwargs)
        with give_row_names(self.model, names):
            yield

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls,
        model: nn.Module,
        config: MoeConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """Select an adapter's tensors by their names without wrappers, all of them or none."""
        plain = unwrapped(state_dict)
        # peft looks up the modules that are trained in full by their names in the model, in this dictionary.
        wrapped = {name: plain_name(name) for name, _ in model.named_parameters()}
        state_dict.update({name: plain[key] for name, key in wrapped.items() if key in plain})
        return own_tensors(model, config, adapter_name, plain)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        name: str = super()._remove_adapter_name_from_key(plain_name(key), adapter_name)
        return name

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls, model: nn.Module, config: MoeConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Give tensors of a file the names that the model has for them, wrappers included."""
        own = named_tensors(model, cls.prefix, adapter_name)
        names = {}
        for key in model.state_dict():
            if plain_name(key) in own:
                inner = own[plain_name(key)].key
                names[inner] = names[f"{PEFT_PREFIX}{inner}"] = key
        remapped = {names.get(plain_name(key), key): tensor for key, tensor in state_dict.items()}
        embeddings: Set[str] = {f"{prefix}{name}" for name in embedding_names(model) for prefix in ("", PEFT_PREFIX)}
        if current(adapter_name) is None:
            embeddings = whole_embeddings(embeddings, remapped)
        shapes = {names[tensor.key]: tensor.shape for tensor in own.values()}
        check_tensors(cls.prefix, model, shapes, remapped, embeddings)
        split = {names[tensor.key]: tensor.split for tensor in own.values() if tensor.split is not None}
        return remapped | {name: rows.split(remapped[name]) for name, rows in split.items()}


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Undo what constructing a tuner does to a model when it fails, also what transformers does before it."""
    try:
        with unchanged_on_error(model):
            yield
    except BaseException:
        if not hasattr(model, "peft_config"):
            model.__dict__.pop("_hf_peft_config_loaded", None)
        raise

"""From an MMDetection config and checkpoint to an archive's members: nothing of either is run unless that is allowed.

CONFIG.py ─► flattened, a literal ─► config.py          CHECKPOINT.pth ─► weights alone ─► strictly into the model
the user's own modules ─► modules/                                            └─► weights.safetensors
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dethandlers.artefact import Artefact, digest_file
from dethandlers.detections import Category
from dethandlers.errors import ArtefactError
from dethandlers.mmdet_model import build_network, custom_imports, require_mmdet
from dethandlers.spec import Source, Spec
from safetensors.torch import save

from detserve.errors import SpecError
from detserve.mmdet_checkpoint import (
    MmdetCheckpoint,
    config_dataset_type,
    mmdet_categories,
    naming_notes,
    read_checkpoint,
)
from detserve.mmdet_config import ConfigError, MmdetConfig, dump_config, load_config, read_config
from detserve.mmdet_modules import module_folders, packed_modules

CONFIG_FILE = "config.py"
WEIGHTS_FILE = "weights.safetensors"


def found_categories(config: MmdetConfig, checkpoint: MmdetCheckpoint) -> tuple[Category, ...]:
    """Return the categories that a checkpoint, its config, or the config's type of data set names.

    Raises:
        SpecError: none of them does.
    """
    try:
        return mmdet_categories(config.values, checkpoint.class_names)
    except SpecError:
        kind = config_dataset_type(config.values)
        known = _names_of_dataset(kind)
        if checkpoint.class_names or not known:
            raise
        return mmdet_categories(config.values, (), of_dataset_type=known)


def mmdet_spec_categories(config: Path, checkpoint: Path, *, allow_code: bool = False) -> tuple[Category, ...]:
    """Return the categories of a model whose spec names none; a config that is not literal is run if allowed.

    Raises:
        DetserveError: one of the files cannot be read, or neither names the classes.
    """
    return found_categories(read_config(config, allow_code=allow_code), read_checkpoint(checkpoint))


@dataclass(frozen=True)
class SourceModel:
    """What a spec of family ``mmdet`` describes.

    Attributes:
        config: flattened.
        checkpoint: as read.
        network: MMDetection's model with the checkpoint's weights, in evaluation mode.
        categories: the spec's, with the model's labels.
    """

    config: MmdetConfig
    checkpoint: MmdetCheckpoint
    network: Any
    categories: tuple[Category, ...]


def load_source(spec: Spec, folder: Path, checkpoint: Path, *, allow_code: bool = False) -> SourceModel:
    """Read a spec's config and checkpoint, and build the model, all of whose weights have to be there.

    Args:
        spec: of family ``mmdet``.
        folder: what its paths are relative to.
        checkpoint: ``.pth`` or ``.safetensors``.
        allow_code: a config that is not literal is run, and the modules that it imports are imported.

    Raises:
        DetserveError: MMDetection is not installed, something cannot be read, does not fit, or would have to be run.
    """
    from detserve.eager_mmdet import load_weights

    try:
        require_mmdet()
    except ArtefactError as error:
        raise SpecError(str(error)) from error
    config = read_config(config_path(spec, folder), allow_code=allow_code)
    read = read_checkpoint(checkpoint)
    categories = mmdet_categories(config.values, read.class_names, given=spec.categories)
    try:
        network = build_network(config.values, modules=module_folders(spec, folder), allow_code=allow_code)
    except ArtefactError as error:
        raise ConfigError(str(error)) from error
    load_weights(network, read, checkpoint.name)
    return SourceModel(config, read, network, categories)


def mmdet_members(
    spec: Spec, folder: Path, checkpoint: Path, *, allow_code: bool = False
) -> tuple[dict[str, bytes], Spec, list[str]]:
    """Return a model's members in the archive, the spec as packed, and notes for people.

    Args:
        spec: of family ``mmdet``.
        folder: what its paths are relative to.
        checkpoint: ``.pth`` or ``.safetensors``.
        allow_code: a config that is not literal is run, and the modules that it imports are imported.

    Raises:
        DetserveError: MMDetection is not installed, something cannot be read, does not fit, or would have to be run.
    """
    model = load_source(spec, folder, checkpoint, allow_code=allow_code)
    config, read, network, categories = model.config, model.checkpoint, model.network, model.categories
    notes = list(read.notes)
    if config.code_ran:
        notes.append(f"{spec.config} was run, since it is more than a literal: {config.code_ran}")
    imports = custom_imports(config.values)
    members, more = packed_modules(spec, folder, imports)
    notes += more
    if imports:
        notes.append(f"{', '.join(imports)} ran, and will run in the worker")
    known = () if read.class_names else _names_of_dataset(config_dataset_type(config.values))
    notes += naming_notes(config.values, read.class_names, spec.categories, of_dataset_type=known)
    # Copies: the layers of some detectors share their tensors, which safetensors refuses.
    state = {name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}
    members |= {WEIGHTS_FILE: save(state), CONFIG_FILE: dump_config(config.values).encode()}
    packed = replace(
        spec,
        categories=categories,
        weights=WEIGHTS_FILE,
        config=CONFIG_FILE,
        modules=(),
        golden_image="",
        source=spec.source or Source(checkpoint.name, digest_file(checkpoint)),
    )
    return members, packed, notes


def config_path(spec: Spec, folder: Path) -> Path:
    """Return where a spec's config lies.

    Raises:
        SpecError: it names none, or it is no file.
    """
    path = folder / spec.config
    if not spec.config or not path.is_file():
        got = f"{path}, which is no file" if spec.config else "none"
        raise SpecError(f"config: got {got}, expected MMDetection's config of the model. Set config in the spec.")
    return path


def code_in(artefact: Artefact) -> list[str]:
    """Return the modules that an unpacked archive's config imports: loading it runs them.

    Raises:
        ConfigError: the config is damaged.
    """
    if artefact.spec.family != "mmdet":
        return []
    try:
        text = (artefact.folder / artefact.spec.config).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{artefact.spec.config}: cannot be read ({error}). Build the archive again.") from error
    return custom_imports(load_config(text))


def _names_of_dataset(kind: str) -> tuple[str, ...]:
    try:
        require_mmdet()
    except ArtefactError:
        return ()
    from dethandlers.mmcv_operators import provide
    from dethandlers.mmdet_model import quiet

    from detserve.eager_mmdet import names_of_dataset

    provide()
    with quiet():
        from mmdet.utils import register_all_modules

        register_all_modules(init_default_scope=False)
        return names_of_dataset(kind)

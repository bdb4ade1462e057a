"""Checks of the model: it can be read, is the right one, has tokeniser and template, and loads in time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.digests import shown_sha256s
from pascaline.doctor.verdicts import Checks, Remedy, Result, failure, info, ok, skipped, warning
from pascaline.engines import engine_named
from pascaline.models.resolve import checksum_problem
from pascaline.units import format_bytes

if TYPE_CHECKING:
    from pascaline.doctor.host import Host

CHECKS = Checks("Model")
check = CHECKS.check

SLOW_LOAD_SECONDS = 60.0
PLAIN_TYPES = frozenset({"F32", "F16", "BF16"})
_CANNOT = "the model cannot be read; see model-format"


@check(
    "model-format",
    "The model is a file or folder that the engine can read",
    "correct the setting model, or download the file again",
    command="pascaline models add NAME URL --sha256 HEX",
    option='services.pascaline.models.<name> = { url = "https://…"; sha256 = "…"; };',
)
def _model_format(host: Host) -> Result:
    """Reads the whole header, so that the evidence names the real defect: missing, cut off, or another kind of file."""
    if host.model.error:
        return failure(host.model.error)
    spec = host.model.spec
    if spec is None:
        return skipped("the settings, which name the model, could not be read; see configuration")
    kind = spec.file_type or spec.format
    return ok(f"{spec.architecture}, {kind}, {format_bytes(spec.file_bytes)}, {spec.n_parameters / 1e9:.2f} B weights")


@check(
    "model-architecture",
    "The engine can serve the model as its file describes it",
    "download the file again, use a model of a supported architecture, or the engine llama.cpp",
    command="pascaline config show --engine llama.cpp",
    option='services.pascaline.instances.<name>.settings.engine = "llama.cpp";',
)
def _model_architecture(host: Host) -> Result:
    """Makes the checks of serve before it starts the engine: an architecture that the plugin loads, every tensor in
    its shape, no unknown metadata key, and everything that the tokenizer needs."""
    spec, settings = host.model.spec, host.settings
    if spec is None or settings is None:
        return skipped(_CANNOT)
    engine = engine_named(settings.engine)
    if refusals := engine.judge_as(spec, settings.role).sentence:
        return failure(refusals)
    return ok(f"{spec.architecture}; {engine.name} decides" if engine.decides_itself else spec.architecture)


@check(
    "model-types",
    "The weights have types that the kernels compute with",
    "quantise the model again, to a type that has kernels",
    command="pascaline quantize MODEL --type Q4_K_M",
)
def _model_types(host: Host) -> Result:
    """Compares the tensors' types with those that the plugin has kernels for. Other types are expanded to 16 bits when
    loaded: the answers are right, but memory and time are three to four times as much."""
    spec, formats = host.model.spec, host.engine.kernel_formats
    if spec is None:
        return skipped(_CANNOT)
    if spec.format != "gguf" or not host.pascal:
        return skipped("no GGUF file on a Pascal card")
    if not formats:
        return skipped("the plugin does not report its types; see engine")
    sizes: dict[str, int] = {}
    for tensor in spec.tensors:
        sizes[tensor.tensor_type] = sizes.get(tensor.tensor_type, 0) + tensor.n_bytes
    other = {name: size for name, size in sizes.items() if name not in formats and name not in PLAIN_TYPES}
    if other:
        return warning(
            "without kernels: " + ", ".join(f"{name} ({format_bytes(size)})" for name, size in other.items())
        )
    return ok(", ".join(sorted(sizes)))


@check(
    "model-checksum",
    "The model file has the checksum that the settings require",
    "download the file again; if it is the one you mean, correct model_sha256",
    command="sha256sum MODEL",
    option='services.pascaline.models.<name>.sha256 = "…";',
)
def _model_checksum(host: Host) -> Result:
    """Compares each file's sha256 with model_sha256. Without one, a damaged or exchanged file goes unnoticed."""
    settings = host.settings
    if settings is None or host.model.spec is None:
        return skipped(_CANNOT)
    if host.model.checksum_error:
        return failure(host.model.checksum_error)
    if settings.model_sha256 is None:
        if host.model.spec.format != "gguf" or settings.model.startswith("builtin:"):
            return skipped("no checksum is set, and none is needed for a folder or the built-in model")
        return info(
            "model_sha256 is not set",
            Remedy(
                "set it, from another source than the server that the file came from",
                f"sha256sum {' '.join(map(str, host.model.spec.files))}",
                'services.pascaline.models.<name>.sha256 = "…";',
            ),
        )
    if problem := checksum_problem(settings, host.model.spec):
        return failure(problem)
    found = host.model.sha256
    files = host.model.spec.files if host.model.spec.format == "gguf" else (host.model.path,)
    for file, digest, expected in zip(files, found, settings.model_sha256, strict=True):
        if digest != expected:
            return failure(f"{file} has sha256 {digest}, must be {expected}")
    return ok(f"sha256 {shown_sha256s(found)}")


@check(
    "model-tokenizer",
    "The model has its tokeniser",
    "convert the model again with its tokeniser files beside it, or copy them into the folder",
    command="ls MODEL_FOLDER/tokenizer*",
)
def _model_tokenizer(host: Host) -> Result:
    """Looks for tokenizer.ggml.tokens in a GGUF file; for tokenizer.json, tokenizer.model or vocab.json in a folder."""
    if host.model.spec is None:
        return skipped(_CANNOT)
    return ok("present") if host.model.has_tokenizer else failure("missing")


@check(
    "model-chat-template",
    "The model has a chat template",
    "use /v1/completions, or a model file with a template; without one, chat answers are wrong",
    command="gguf-dump MODEL | grep chat_template",
)
def _model_chat_template(host: Host) -> Result:
    """Looks for the template that turns messages into a prompt. A base model has none and cannot chat."""
    if host.model.spec is None:
        return skipped(_CANNOT)
    return ok("present") if host.model.has_chat_template else warning("missing: only completions work well")


@check(
    "model-context",
    "The context is no longer than the model was trained for",
    "lower context_length to the model's length",
    command="pascaline config show --context-length N",
    option="services.pascaline.instances.<name>.settings.context_length = 4096;",
)
def _model_context(host: Host) -> Result:
    """Compares context_length with the length that the model was trained for."""
    spec, settings = host.model.spec, host.settings
    if spec is None or settings is None:
        return skipped(_CANNOT)
    asked = settings.context_length
    words = f"{asked or spec.context_length} of {spec.context_length} tokens"
    return failure(words) if asked is not None and spec.context_length and asked > spec.context_length else ok(words)


@check(
    "disk-speed",
    "The disk reads the model in reasonable time",
    "put the model on a faster disk (NVMe), or be patient: it is read once per start",
    command="fio --name=read --rw=read --bs=4M --direct=1 --size=1G --filename=MODEL",
    option='services.pascaline.stateDir = "/data/pascaline";',
)
def _disk_speed(host: Host) -> Result:
    """Reads hundreds of megabytes of the model past the page cache and says what a cold start costs. The guide expects
    10 s."""
    spec, speed, settings = host.model.spec, host.model.read_bytes_per_second, host.settings
    if spec is None or settings is None:
        return skipped(_CANNOT)
    if speed is None:
        return skipped("the file is too small, or its file system does not allow direct reads")
    seconds = spec.file_bytes / speed
    words = f"{speed / 1e6:.0f} MB/s: {seconds:.0f} s for {format_bytes(spec.file_bytes)}"
    if seconds > settings.start_timeout:
        return failure(f"{words}, above start_timeout ({settings.start_timeout:g} s)")
    return warning(words) if seconds > SLOW_LOAD_SECONDS else ok(words)

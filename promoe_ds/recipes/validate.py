"""What a configuration must satisfy by itself; `config/batching.py` checks it against the number of processes.

Pure: nothing is changed, and nothing read but the configuration (`validate_data` looks at files too). Every failure is
a one-line `ConfigError`.
"""

from __future__ import annotations

from pathlib import PurePath

from promoe_ds.config.batching import divisors, listed
from promoe_ds.config.errors import reject
from promoe_ds.config.option import options
from promoe_ds.config.schedule import validate_schedule
from promoe_ds.config.schema import Channels, Config, Interval, ModelConfig
from promoe_ds.diffusion.objective import OBJECTIVES, Solver, check_steps


def _validate_name(name: str) -> None:
    """It is joined to runs/, and a run is not written elsewhere without being told so."""
    parts = PurePath(name).parts
    if not parts or ".." in parts or PurePath(name).is_absolute():
        way_out = "choose one without `..`, or name another folder with --run"
        reject("name", name, "is the name of the run folder in runs/", way_out)


def _validate_model(config: Config) -> None:
    m = config.model
    if m.width % m.heads:
        reject("model.width", m.width, f"is not divisible by model.heads={m.heads}", "change one of them")
    if m.width % 4:
        reject("model.width", m.width, "the 2-D sine-cosine table needs a multiple of 4", "round it")
    if m.image_size % m.patch:
        reject("model.image_size", m.image_size, f"is not divisible by model.patch={m.patch}", "change one of them")
    _whole_hidden("model.mlp_ratio", m.mlp_ratio, m.width)


def _whole_hidden(path: str, ratio: float, width: int) -> None:
    if not (ratio * width).is_integer():
        reject(path, ratio, f"times model.width={width} is not a whole number of hidden units", "change one of them")


def _aligned(config: Config) -> None:
    """Grouped GEMM reads rows in units of 16 bytes."""
    moe, width, precision = config.moe, config.model.width, config.train.precision
    unit = 4 if precision == "fp32" else 8
    if moe is None or moe.experts_backend == "loop":
        return
    for path, value in (("model.width", width), ("moe.hidden_ratio * model.width", int(moe.hidden_ratio * width))):
        if value % unit:
            conflict = f"{moe.experts_backend} under train.precision={precision} needs a multiple of {unit}"
            reject(path, value, conflict, "change it, or set moe.experts_backend=loop")


def _validate_moe(config: Config) -> None:
    moe, ep = config.moe, config.parallel.expert_parallel
    if moe is None:
        if ep != 1:
            reject("parallel.expert_parallel", ep, "the model is dense (moe: null)", "set it to 1")
        return
    _whole_hidden("moe.hidden_ratio", moe.hidden_ratio, config.model.width)
    _aligned(config)
    if moe.conditional and moe.num_unconditional == 0 and moe.num_shared == 0:
        conflict = "null-label images would meet no expert (moe.num_shared=0)"
        reject("moe.num_unconditional", 0, conflict, "set one of them to 1")
    if moe.num_experts % ep:
        way_out = f"choose one of {listed(divisors(moe.num_experts))} that also divides the number of processes"
        reject("parallel.expert_parallel", ep, f"does not divide moe.num_experts={moe.num_experts}", way_out)
    if isinstance(moe.layers, tuple):
        bad = [i for i in moe.layers if not 0 <= i < config.model.depth]
        if bad or len(set(moe.layers)) != len(moe.layers):
            conflict = f"needs distinct indices below model.depth={config.model.depth}"
            reject("moe.layers", moe.layers, conflict, "list block indices, or write every_other or all")
    if not config.moe_layers():
        conflict = f"selects no block of model.depth={config.model.depth}"
        reject("moe.layers", moe.layers, conflict, "write all, or moe: null for a dense model")
    moe.router.validate(config)


def _validate_start(config: Config) -> None:
    """What a run starts from."""
    cfg = config.train
    if cfg.init_reset and cfg.init is None:
        conflict = "there are no weights to reset (train.init=null)"
        reject("train.init_reset", cfg.init_reset, conflict, "add train.init=PATH or leave it out")
    if "experts" in cfg.init_reset and config.moe is None:
        reject("train.init_reset", cfg.init_reset, "the model is dense (moe: null)", "leave out experts")


def _validate_speed(config: Config) -> None:
    """Ways to compute the same."""
    cfg, text = config.train, config.train.profile
    if text is not None:
        first, colon, last = text.partition(":")
        if not colon or not (first.isdecimal() and last.isdecimal()) or not 1 <= int(first) <= int(last):
            reject("train.profile", repr(text), "is not A:B with steps 1 <= A <= B", "write for example 20:23")
        if int(first) > cfg.steps:
            reject("train.profile", text, f"begins after train.steps={cfg.steps}", "choose earlier steps")
    if cfg.compile and cfg.activation_checkpointing == "selective":
        conflict = "what a compiled part computes inside cannot be kept one by one"
        reject("train.activation_checkpointing", "selective", conflict, "set it to block, or train.compile=false")
    if cfg.residual == "bf16" and cfg.precision != "bf16_autocast":
        conflict = f"is of bf16_autocast, and train.precision={cfg.precision}"
        reject("train.residual", "bf16", conflict, "set train.precision=bf16_autocast, or leave it out")
    if config.moe and config.moe.experts_backend == "megablocks" and cfg.precision == "fp32":
        conflict = "megablocks computes in bf16 only, and train.precision is fp32"
        reject("moe.experts_backend", "megablocks", conflict, "set train.precision=bf16_autocast, or use grouped_mm")


def check_guidance(model: ModelConfig, channels: Channels, path: str) -> None:
    """Raise `ConfigError`, naming `path`, if three channels are to be guided and the model has fewer."""
    if channels != "all" and model.channels < channels:
        reject(path, channels, f"the model has model.channels={model.channels}", f"set {path}=all")


def check_interval(interval: Interval, path: str) -> None:
    """Raise `ConfigError`, naming `path`, if an interval of guidance is not one."""
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1000:
        shown = ",".join(f"{end:g}" for end in interval)
        reject(path, f"[{shown}]", "is not [lo, hi] with 0 <= lo <= hi <= 1000", "write for example [100, 900]")


def _validate_objective(config: Config) -> None:
    """What is trained and how the sample grids are drawn."""
    check_guidance(config.model, config.guidance.channels, "guidance.channels")
    if config.diffusion.name == "ddpm" and not config.model.learn_sigma:
        conflict = "diffusion.name=ddpm learns a variance range"
        reject("model.learn_sigma", "false", conflict, "set model.learn_sigma=true")
    check_interval(config.guidance.interval, "guidance.interval")
    if config.diffusion.name == "ddpm" and config.sample.shift is not None:
        conflict = "diffusion.name=ddpm has no noise levels to shift"
        reject("sample.shift", config.sample.shift, conflict, "set sample.shift=null")
    sampler = OBJECTIVES[config.diffusion.name].samplers[0]
    check_steps(config.diffusion, Solver(sampler, config.sample.steps), "sample.steps")


def _validate_scores(config: Config) -> None:
    """Scores while training have something to be compared with."""
    cfg = config.train
    if cfg.score_every and cfg.score_ref is None and config.data.name != "digits":
        conflict = "train.score_every needs real images, or their statistics"
        reject("train.score_ref", "null", conflict, "name what launchers/evaluate.py --ref accepts")


def _validate_averages(config: Config) -> None:
    """An average is known by its decay."""
    decays = [config.optimizer.ema_decay, *config.optimizer.ema_more]
    if twice := [decay for decay in decays if decays.count(decay) > 1]:
        way_out = "leave it out: optimizer.ema_more are those beside optimizer.ema_decay"
        reject("optimizer.ema_more", config.optimizer.ema_more, f"{twice[0]} is kept twice", way_out)


def validate(config: Config) -> None:
    """Check everything that depends on the config alone; changes nothing. Raises `ConfigError`."""
    for path, known, value in options(config):
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and known.below is None and abs(number) >= 2**63:
                shown = f"{str(number)[:9]}... ({len(str(abs(number)))} digits)"
                reject(path, shown, "does not fit into 64 bits", "choose a smaller number")
            if isinstance(number, int | float) and not known.allows(number):
                reject(path, number, f"must {known.range()}", "choose such a value")
            if isinstance(number, float) and number and not 2**-126 <= abs(number) < 2**128:
                reject(path, number, "is outside the normal range of float32", "choose a number nearer to 1, or 0")
    _validate_name(config.name)
    _validate_model(config)
    _validate_moe(config)
    _validate_start(config)
    _validate_speed(config)
    _validate_objective(config)
    validate_schedule(config)
    _validate_averages(config)
    _validate_scores(config)


def validate_data(config: Config) -> None:
    """Check the files that training reads; before training, not before a dry run. Raises `ConfigError`."""
    if config.data.name != "digits" and config.data.path is None:
        reject("data.path", "null", f"data.name={config.data.name} needs one", "add data.path=PATH")
    if config.moe is not None:
        config.moe.router.validate_files(config)

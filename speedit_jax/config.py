"""Every knob, once, with its default, unit and reason. Other configs start from here and change what they must.

Override any of them on the command line: --config.optim.learning_rate=2e-4 --config.training.batch_size=64
Every config takes the model's name after a colon: --config=base:DiG-S/2
"""

from typing import Any

import ml_collections
from ml_collections import config_dict

# Keys whose default is not how runs behaved that are older than the key: how they did.
LEGACY = {"optim.decay_mask": "all"}
# Keys of the section `model` that one backbone alone looks at.
OF_BACKBONE = {"DiT": ("mlp_ratio", "qk_norm"), "DiG": ("gla", "directions", "convolution")}
LARGEST_SEED = 2**32 - 1  # jax.random.key keeps 32 bits, and silently drops the others


def get_config(model_name: str = "DiT-S/2") -> ml_collections.ConfigDict:
    """The defaults of all knobs, for a model "BACKBONE-SIZE/PATCH"."""
    c = ml_collections.ConfigDict()
    c.init_from = ""  # the directory of a run, or of imported weights, whose EMA a new run starts from; "" starts at random
    c.seed = 0  # seed of weights, data order, noise, timesteps and label dropout

    c.data = data = ml_collections.ConfigDict()
    data.source = "synthetic"  # digits, folder:PATH, tfds:NAME, latents:PATH (of speedit_jax.encode), synthetic or blobs
    data.split = "train"  # of tfds (also train[:90%], train+test) or of digits and blobs (train, held_out)
    data.classes = ""  # only these classes: names or numbers, separated by commas, renumbered in this order; "" takes all
    data.height = 32  # pixels; images of folders and of tfds are scaled and cropped to height x width; latents have their own
    data.width = 32
    data.channels = 3
    data.background = "white"  # behind transparent parts of images, whose hidden colours mean nothing: a name or "#rrggbb"
    data.vae = ""  # a diffusers VAE, directory or hub name: encodes images at every step, and decodes latents to images
    data.text = ""  # the captions of these images: a directory that speedit_jax.encode_text wrote; "" trains on classes
    # What an image encoder made of these images, for regularizer.align_target=features: a directory of speedit_jax.features.
    data.features = ""
    # Random parts of each image that the network is told, so that it learns to fill the rest: boxes, strokes or mixed; "" trains
    # on whole images alone: docs/inpainting.md
    data.mask = ""
    data.mask_all = 0.25  # share of the images of which nothing is told: keeps the drawing of whole images, as Stable Diffusion's
    data.flip = False  # mirror half of the images: not for digits or text
    data.max_broken = 0  # how many undecodable files of a folder are reported and replaced by the next image
    data.threads = 4  # threads that decode images
    data.synthetic_size = 4096  # images of the synthetic set and of the blobs
    data.synthetic_classes = 10  # 0 is unconditional

    c.model = model = ml_collections.ConfigDict()
    model.name = model_name  # BACKBONE-SIZE/PATCH: DiT, DiG - tiny, S, B, L, XL / 1, 2, 4, 8, 16, 32
    model.width = 0  # D; 0 takes the size's own, as for the next two
    model.depth = 0
    model.heads = 0
    model.mlp_ratio = 4.0  # DiT: hidden width of the MLP in D; DiG's SwiGLU has the paper's own
    model.time_freq_shift = 0  # 1: the lowest timestep frequency is 1e-4, as in diffusers' DiT; 0: 1.07e-4, as published
    # Probability of replacing a label by the null label, or a caption by the empty text; with 0 the model cannot be guided.
    model.label_dropout = 0.1
    model.text = "cross"  # with data.text: cross (attention to its tokens, as PixArt) or pooled (their mean joins the timestep)
    model.adaln = "block"  # block: adaLN-Zero, a layer in every block; single: one for all blocks and a table in each, as PixArt
    model.position_scale = 1.0  # divides the positions of the sine-cosine table; diffusers' interpolation_scale
    model.qk_norm = False  # DiT: RMSNorm of queries and keys (Dehghani et al., arXiv 2302.05442), for large learning rates
    model.rope = False  # DiT: queries and keys turn with their place (2-D rotary positions), besides the position table
    model.mlp = "gelu"  # DiT: gelu or swiglu, of as many weights
    # Width of a linear layer between the numbers of a patch and D; 0: there is none. For patches of pixels 128, as JiT
    # (arXiv 2511.13720).
    model.patch_bottleneck = 0
    # DiT; auto: cudnn on GPU in bfloat16, pallas on TPU, else xla; chunked: linear memory, also of DiG's attention to text.
    model.attention = "auto"
    model.gla = "auto"  # DiG: auto (pallas_tpu, pallas_gpu or xla by platform), or any of them, or reference (token by token)
    model.directions = 4  # DiG: scan orders; 4: rows and columns in both directions; 2: rows in both directions; 1: one direction
    model.convolution = "identity"  # DiG: the 3x3's start: identity, random, or none for no convolution
    model.norm = "layer"  # layer (as published) or rms, with learned weights (JiT; drawn so in DiG's paper)
    model.remat = "none"  # none, lean or full: how much of a layer is recomputed instead of saved
    model.scan_unroll = 1  # layers per iteration of the scan over depth: more compiles longer and runs a little faster
    model.dtype = "auto"  # of activations: float32 on CPU, bfloat16 elsewhere; parameters are always float32

    c.diffusion = diffusion = ml_collections.ConfigDict()
    diffusion.path = "vp"  # vp: diffusion, as the next keys say; linear or gvp: flow matching
    diffusion.schedule = "linear"  # linear, squaredcos_cap_v2 (or cosine, the same), quad (scaled_linear in diffusers) or const
    diffusion.beta_start = 0.0  # of linear and quad: their first and last beta; 0 takes 1000 / num_steps times 1e-4 and
    diffusion.beta_end = 0.0  # 0.02, as published; others are for weights of pipelines that were trained with them
    diffusion.num_steps = 1000  # noise levels of training; sampling.num_steps is separate
    # What the network learns: epsilon (the noise), x0 (the image) or v (both: v-prediction). Of flows: x0, or for the others the
    # velocity.
    diffusion.prediction = "epsilon"
    diffusion.x0_clamp = 0.05  # flows that predict x0: least noise level that the error of the image is divided by; JiT's
    diffusion.noise_scale = 1.0  # flows: standard deviation of the noise; 2 for 512 pixels, where a patch shows more of the image
    diffusion.variance = "learned_range"  # learned_range, fixed_small or fixed_large
    diffusion.loss = "mse"  # mse, rescaled_mse, or the variational bound alone: kl or rescaled_kl; docs/speedit.md

    c.tokens = tokens = ml_collections.ConfigDict()  # which tokens the middle blocks see in training: docs/acceleration.md
    # none: all; route: some skip the middle blocks (TREAD, arXiv 2501.04765); sprint: the others' result is fused with what all
    # tokens were before (SPRINT, arXiv 2510.21986); mask: in a second pass some are masked (DiT; MDT, arXiv 2303.14389).
    tokens.method = "none"
    # Share of an image's tokens that skip them or are masked; SPRINT's 0.75, and 0, none, for its last phase; MDT's 0.3.
    tokens.rate = 0.5
    # Which they are: random (DiT), or cells: all but one of each cell of the grid, of 1 x 2 tokens (rate 0.5) or 2 x 2 (0.75).
    tokens.pattern = "random"
    tokens.start = 2  # first blocks, which see all tokens; mask does not use it
    tokens.tail = 3  # last blocks, which see all tokens again; SPRINT's and MDT's 2
    tokens.path_drop = 0.1  # sprint: share of the images whose middle blocks are dropped, for path-drop guidance

    c.regularizer = regularizer = ml_collections.ConfigDict()  # losses added to the objective: docs/acceleration.md
    # Weight of a loss that drives hidden states of different examples apart (DiT; arXiv 2506.09027): 0.5; 0 is off.
    regularizer.dispersive = 0.0
    regularizer.dispersive_temperature = 0.5
    regularizer.dispersive_depth = 3  # blocks before the hidden state: a quarter of the depth
    regularizer.dispersive_group = 16  # examples that drive each other apart; divides batch_size / accumulation
    # Weight of contrastive flow matching (flows that predict the velocity; arXiv 2506.05350): 0.05; 0 is off.
    regularizer.contrastive = 0.0
    # Weight of a loss that pulls an early hidden state to align_target (DiT): 0.5 with cosine, 0.2 with smooth_l1, 1.0 with conv;
    # 0 is off.
    regularizer.align = 0.0
    # ema: later hidden states of the EMA network on a less noisy image (SRA, arXiv 2505.02831); features: those of the image
    # without noise in data.features (REPA, arXiv 2410.06940).
    regularizer.align_target = "ema"
    regularizer.align_loss = "cosine"  # over channels; or smooth_l1, the paper's, which grows with the states' norms
    regularizer.align_depth = 4  # blocks before the hidden state; 8 for L and XL
    regularizer.align_teacher_depth = 8  # ema: blocks before the EMA network's; 20 of flows, or 16, for L and XL
    regularizer.align_time_gap = 0.2  # ema: that network's image is less noisy by a random part of this share of the schedule
    regularizer.align_head = "mlp"  # features: mlp (three layers, REPA) or conv (3x3 on the grid, iREPA, arXiv 2512.10794)
    # features: share of their mean over an image that is taken off before each channel is scaled to a standard deviation of 1
    # over that image, as iREPA does with 0.6 to 1; 0 does neither.
    regularizer.align_spatial_norm = 0.0
    # Optimizer steps after which the weight is 0, because alignment holds a network back in the end (HASTE, arXiv 2505.16792:
    # 250,000); 0 never.
    regularizer.align_until = 0

    c.timesteps = timesteps = ml_collections.ConfigDict()
    # uniform, p2, min_snr, lognormal, logit_normal, laplace, clts, loss_second_moment, gradient_noise, speedit or
    # speed_cvpr25: docs/speedit.md
    timesteps.strategy = "speedit"
    # Replaces the strategy's density: uniform, lognormal, logit_normal, laplace, clts, loss_second_moment, gradient_noise,
    # speedit or speed
    timesteps.sampling = config_dict.placeholder(str)
    # Replaces its loss weight: none, p2, min_snr, edm, flow or change_aware
    timesteps.weighting = config_dict.placeholder(str)
    timesteps.dual = config_dict.placeholder(bool)  # replaces its choice of drawing half of the batch as duals
    timesteps.k = 5.0  # speed: how many times more often the first tau steps are drawn
    timesteps.tau = 700.0  # speed: boundary in thousandths of the schedule
    timesteps.gamma = 5.0  # min_snr: where the weight starts to fall
    timesteps.log_sigma_mean = -1.2  # lognormal: of the logarithm of noise over signal
    timesteps.log_sigma_std = 1.2
    timesteps.sigma_data = 0.5  # edm: standard deviation of the data; about 1 for scaled latents
    timesteps.logit_mean = 0.0  # logit_normal: of the logit of the time of a rectified flow; more is noisier
    timesteps.logit_std = 1.0
    timesteps.clts_mean = 300.0  # clts: of the Gaussian that the density becomes, in thousandths of the schedule
    timesteps.clts_std = 250.0
    timesteps.clts_steps = 50_000  # clts: optimizer steps until it is reached, from uniform
    timesteps.laplace_mean = 0.0  # laplace: of log-SNR; more is less noisy
    timesteps.laplace_scale = 0.5  # and its mean distance from there
    timesteps.probe_every = 100  # gradient_noise: optimizer steps between two measurements, each of the cost of a step
    timesteps.lam = 0.6  # change_aware: 0.5 (no weighting) to 1

    c.optim = optim = ml_collections.ConfigDict()
    optim.learning_rate = 1e-4
    optim.schedule = "constant"  # after the warm-up: constant, or cosine to zero at training.num_steps
    optim.warmup_steps = 0
    optim.b1 = 0.9
    optim.b2 = 0.999
    optim.eps = 1e-8
    optim.weight_decay = 0.0  # decoupled (AdamW), times the learning rate; 0 decays nothing
    # What decays: matrices (not biases, norms, the label table, DiG's filters or SPRINT's fusion) or all; auto: matrices, but all
    # in a run that is older than this key.
    optim.decay_mask = "auto"
    optim.clip_norm = 1.0  # largest global norm of a gradient; 0 does not clip

    c.training = training = ml_collections.ConfigDict()
    training.num_steps = 400_000  # optimizer steps
    training.batch_size = 256  # images an optimizer step, over all devices and microbatches
    training.accumulation = 1  # microbatches an optimizer step: less memory, the same gradient
    training.ema_decay = 0.9999
    training.extra_ema_decays = ()  # further averages, each as large as the model: "(0.999,0.9995)"; sample --weights=ema_0.999
    training.ema_warmup = False  # min(ema_decay, (1 + step) / (10 + step)): for short runs
    training.log_every = 100  # steps
    training.sample_every = 10_000  # steps between image grids; 0 draws none
    training.profile_at = 0  # step from which the profiler's trace is written to WORKDIR/tensorboard; 0 writes none
    training.profile_steps = 3  # steps in the trace
    training.wandb_project = ""  # also log to this project of Weights & Biases: pip install -e '.[wandb]'; "" does not
    training.max_skipped_in_a_row = 20  # this many non-finite gradients in a row stop the run
    # Seconds without a sign of life after which a hung process ends, with the stack of every thread and exit code 75, which
    # schedulers restart on; longer than compiling, a save or a batch of samples takes. 0 never ends it.
    training.hang_after = 1_800

    c.checkpoint = checkpoint = ml_collections.ConfigDict()
    checkpoint.every = 5_000  # steps; a run that ends or is interrupted saves too
    checkpoint.keep_last = 2  # newest checkpoints kept
    checkpoint.keep_every = 0  # steps; checkpoints at multiples of this are never removed; 0 keeps none

    c.sampling = sampling = ml_collections.ConfigDict()  # defaults of sample.py, and of the grids of training
    sampling.sampler = "auto"  # ddpm, ddim or dpm++, of flows euler, heun or sde; auto: ddim or euler; docs/sampling.md
    # How many, evenly spaced; "ddim50", every so many from the first; "trailing50", back from the last; or "10,15,20", for
    # sections from the least noisy to the noisiest.
    sampling.num_steps = ml_collections.FieldReference(50, field_type=object)
    sampling.spacing = "even"  # of the steps: even in t, or logsnr: better for dpm++ with few steps
    sampling.eta = 0.0  # noise of ddim and dpm++: 0 is deterministic
    sampling.guidance_scale = 1.5  # 1 is no guidance, at half the cost
    sampling.guidance_channels = 0  # leading channels that are guided: 0 is all; 3 as in the published DiT's samples
    sampling.guidance_schedule = "constant"  # constant, linear or cosine: weak at high noise, of the same mean
    sampling.guidance_low = 0.0  # guide where the noise level is in low..high: 0 clean, 1 pure noise, linear in the
    sampling.guidance_high = 1.0  # timestep; other steps need only one pass
    # Of models trained with tokens.method=route, sparse guidance (arXiv 2601.01608): guided away from the same network with fewer
    # tokens in its middle blocks, instead of from the null label. The shares of tokens that skip them; equal: off.
    sampling.sparse_strong = 0.0  # of the guided network; the paper takes 0.5 and 0.9
    sampling.sparse_weak = 0.0  # of the one that it is guided away from
    sampling.path_drop_guidance = False  # tokens.method=sprint: the prediction without condition skips the middle blocks, too
    sampling.clip = True  # clip the predicted image to [-1, 1]: for pixels; latents want False
    sampling.grid_images = 64  # images of a grid during training

    c.evaluation = evaluation = ml_collections.ConfigDict()  # of the EMA weights during training: docs/evaluation.md
    evaluation.every = 0  # steps; evaluated steps and the last step are saved; 0 never evaluates
    evaluation.num_images = 1_000  # drawn with the settings in `sampling`; published FIDs use 50,000, which gives lower values
    evaluation.batch_size = 64  # batch size over all devices; equal to sampling.grid_images, the sampler is compiled only once
    evaluation.metrics = "fid"  # of fid, sfid, is, kid, pr, commas between
    evaluation.best = "fid"  # the checkpoint with the best of this is kept: fid, sfid, is, kid, precision or recall
    evaluation.features = "inception"  # or pixels: for tiny images, and without weights
    evaluation.inception = ""  # weights of FID's Inception-v3
    evaluation.reference = ""  # compare with: "" is the images of training; else as evaluate's --reference, an npz or images
    evaluation.split = "train"  # of a reference that is digits or tfds:NAME, as data.split
    evaluation.seed = 0  # of the noise, which is the same each time, and of random parts of the metrics
    # The held-out loss: the unweighted mse on examples, timesteps and noise that stay the same, so that its values compare
    # across strategies. A strategy moves the mean of its own training mse.
    evaluation.loss_every = 0  # steps between measurements, of the EMA weights and of the raw ones; 0 measures none
    evaluation.loss_source = ""  # the examples, as data.source; "" is data.source
    evaluation.loss_split = ""  # of the digits or tfds, as data.split; "" is data.split, or train of another loss_source
    evaluation.loss_text = ""  # their captions where they are not the run's own examples, as data.text
    evaluation.loss_images = 256  # examples, evenly spaced over the source; each is measured at 4 noise levels

    c.mesh = mesh = ml_collections.ConfigDict()  # devices along each axis; one may be -1 and takes the rest
    mesh.data = -1  # batch only
    mesh.fsdp = 1  # batch and parameters: for models that do not fit one device
    mesh.tensor = 1  # heads and MLP: must divide the heads
    mesh.slices = 1  # TPU slices, or nodes of GPUs, among which mesh.data is divided, so that only gradients cross their network
    return c.lock()  # a misspelt key in a recipe is an error, as it is on the command line


def complete(saved: dict[str, Any]) -> ml_collections.ConfigDict:
    """A saved config. Keys younger than the run get the values that reproduce how it behaved: their defaults, or LEGACY's."""

    def over(defaults, saved):
        if not isinstance(defaults, dict) or not isinstance(saved, dict):
            return saved
        return defaults | {key: over(defaults.get(key), value) for key, value in saved.items()}

    older = get_config()
    older.update_from_flattened_dict(LEGACY)
    config = ml_collections.ConfigDict(over(older.to_dict(), saved))
    if "x0_clamp" not in saved.get("diffusion", {}):
        # These keys did nothing then: all flows predicted the velocity, and DiT had no other norm.
        config.diffusion.prediction = config.diffusion.prediction if config.diffusion.path == "vp" else "epsilon"
        config.model.norm = "layer" if config.model.name.startswith("DiT") else config.model.norm
    # Nor do the other backbone's, which training takes no longer.
    others = (keys for backbone, keys in OF_BACKBONE.items() if not config.model.name.startswith(backbone))
    config.model.update({key: older.model[key] for keys in others for key in keys})
    return config


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"section.key": value}, with tuples as the lists that JSON makes of them."""
    found = {}
    for key, value in tree.items():
        value = list(value) if isinstance(value, tuple) else value
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found

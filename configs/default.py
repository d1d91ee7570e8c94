"""The default config, which every recipe modifies; configs/validate.py checks it.

Field names are those of the official release if the meaning is the same. Three differ on purpose:
`training.truncation` replaces the flag `st`; `training.likelihood_weighting` chooses the weighting
independently of how times are drawn; `model.dtype` is new.
"""

from ml_collections import ConfigDict

from configs.old_names import DataSection


def get_default_config() -> ConfigDict:
    """The defaults: VP, DDPM++ for 32×32 images, likelihood weighting with soft truncation."""
    config = ConfigDict()
    config.seed = 42

    config.data = data = DataSection()
    data.dataset = "CIFAR10"  # docs/data.md lists them
    data.category = ""  # LSUN: bedroom, church_outdoor, …
    data.path = ""  # the authors' files, images, parquet or arrays; empty: download if possible
    data.skip_unreadable = False  # leave out files that are not readable images, instead of failing
    data.max_pixels = 2**26  # images with more are refused, since they take so much memory
    data.tfds_dir = ""  # a folder of TFDS, where it prepares missing data sets
    data.cache = True  # keep decoded images in the user's cache folder
    data.image_size = 32  # for array, this and the four fields below it are read from the file
    data.image_width = 0  # of array, if it is not image_size; 0: it is
    data.num_channels = 3
    data.num_levels = 0  # array of whole numbers: how many values there are; 0: read; floats: 0
    # Array of floats: the lowest and the highest value of the training images; numbers, or a tuple
    # each with a number for each channel. (): read, for each channel.
    data.scale = ()
    # array: 1: examples are (C, H, W); 0: (H, W, C); -1: (H, W, C), and the other is refused.
    data.channels_first = -1
    data.pad = False  # array: whether to pad its images to a size that the network's levels divide
    data.centered = True  # images in [-1, 1] instead of [0, 1]
    data.random_flip = True
    data.dequantization = "uniform"  # none, uniform, or lossless (a discrete decoder)
    data.classes = ()  # the labels' names, of a network that is told labels; (): the data set's

    config.model = model = ConfigDict()
    # A name in models/networks.py: ncsnpp or, as in EDM, edm; ddpm, the plain U-Net, which reads
    # only dtype, nf, ch_mult, num_res_blocks, attn_resolutions, dropout, init_scale and
    # resamp_with_conv; or ncsnv2_64, ncsnv2_128 or ncsnv2_256, which read only dtype and nf.
    model.name = "ncsnpp"
    model.license = ""  # of the weights, for cards, as the hub spells it: mit, cc-by-4.0, …
    model.dtype = "float32"  # compute dtype: float32 or bfloat16; parameters are always float32
    model.remat = False  # rematerialisation: less memory, but slower steps
    model.nf = 128
    model.ch_mult = (1, 2, 2, 2)
    model.num_res_blocks = 4
    model.attn_resolutions = (16,)
    model.dropout = 0.1
    model.resblock_type = "biggan"  # biggan or ddpm
    model.resamp_with_conv = True  # between ddpm blocks
    model.fir = False  # resample with an FIR filter
    model.fir_kernel = (1, 3, 3, 1)
    model.progressive = "none"  # none, output_skip or residual
    model.progressive_input = "none"  # none, input_skip or residual
    model.progressive_combine = "sum"  # sum or cat
    model.embedding_type = "positional"  # positional or fourier
    model.embedding_dim = 0  # width of the positional embedding; 0: nf
    model.fourier_scale = 16.0
    model.fourier_feature = False  # sines and cosines of the pixels as additional input
    model.patch_size = 1  # P×P pixels become the channels of one position; 1: none
    model.scale_by_sigma = False  # VE and RVE: the network's output is divided by σ(t)
    model.num_classes = 0  # of labels that the network is told; 0: none; -1: the data set's
    # What the network F predicts. noise: the noise, or VE's and RVE's score, as in the release;
    # velocity: D = c_skip x + c_out F(c_in x) is the denoised image (docs/objective.md).
    model.parametrization = "noise"
    model.sigma_data = 1.0  # velocity: the data's standard deviation that its c's are for
    model.skip_rescale = True
    model.init_scale = 0.0
    model.ema_rate = 0.9999
    model.beta_min = 0.1
    model.beta_max = 20.0
    model.sigma_min = 0.01
    model.sigma_max = 50.0
    model.num_scales = 1000  # steps of the PC sampler

    config.optim = optim = ConfigDict()
    optim.optimizer = "Adam"  # a name in train_step.OPTIMIZERS: Adam or AdamW (decoupled decay)
    optim.lr = 2e-4
    optim.schedule = "constant"  # of the rate, in train_step.SCHEDULES: cosine or inverse_sqrt
    optim.decay_start = 70_000  # inverse_sqrt: the step at which the rate begins to fall
    optim.beta1 = 0.9
    optim.eps = 1e-8
    optim.weight_decay = 0.0
    optim.warmup = 5000
    optim.grad_clip = 1.0  # global norm; negative: no clipping
    optim.num_micro_batch = 1

    config.training = training = ConfigDict()
    training.sde = "vpsde"  # vpsde, subvpsde, vesde or reciprocal_vesde
    training.objective = "score_matching"  # or edm, or one's own, a name in losses.OBJECTIVES
    training.batch_size = 128  # the global batch, over all devices
    training.n_iters = 1_300_001
    training.truncation = "soft"  # fixed, soft or equivalent_weight
    # The prior on the truncation, a name in losses.PRIORS: power, P(τ) ∝ τ^-k; or sigmoid or
    # velocity, for which soft truncation equals that weighting of the noise's error.
    training.prior = "power"
    training.k = 1.0  # the exponent of the power prior
    training.sigmoid_bias = 0.0  # b in the sigmoid prior's weighting sigmoid(γ + b)
    training.truncation_time = 1e-5
    training.likelihood_weighting = True  # λ = g²; else λ = σ²
    training.weighting = ""  # another λ, a name in losses.WEIGHTINGS
    training.importance_sampling = True  # t ~ g²/σ²; else uniform
    training.stratified_times = False  # spread the uniforms of a batch's times evenly over [0, 1]
    training.mixed = False  # half of each batch has λ = σ² and uniform t
    training.ddpm_weight = 0.01  # the weight of that half's loss
    training.balanced = False  # scale that half's loss to the size of the other half's first
    training.reconstruction_loss = False  # add the residual at τ
    training.unbounded_parametrization = False  # the network's time is γ(t), as in UDDPM++
    training.stabilizing_constant = 1e-3  # c in γ(t) = log (σ² + c)/α², which bounds it
    # The share of labels that the network isn't told, so that it learns to do without, too.
    training.label_dropout = 0.1
    training.reduce_mean = True  # loss per dimension instead of per image
    # Steps in one call, at most; the number used divides the four intervals below. 1 on a CPU.
    training.n_jitted_steps = 10
    training.log_freq = 100
    # 0 chooses the next three by the number of training images, by epochs.
    training.eval_freq = 1000  # loss on the test split
    training.snapshot_freq = 100_000  # checkpoints that are kept permanently
    training.snapshot_freq_for_preemption = 10_000  # checkpoints to resume from; two are kept
    training.snapshot_sampling = True  # a grid of samples at every snapshot
    training.max_skipped_steps = 10  # stop after so many steps in a row that are not finite
    training.max_failed_saves = 3  # stop after so many failed saves in a row

    config.sampling = sampling = ConfigDict()
    sampling.method = "pc"  # pc, ode, heun or dpm_solver
    sampling.num_steps = 20  # of heun and dpm_solver; pc uses model.num_scales
    sampling.predictor = "euler_maruyama"  # or reverse_diffusion, ancestral_sampling, none
    sampling.corrector = "none"  # none, langevin or ald
    sampling.probability_flow = False  # the predictor solves the ODE
    sampling.n_steps_each = 1
    sampling.snr = 0.16
    sampling.noise_removal = True
    sampling.truncation_time = 1e-5
    sampling.rtol = 1e-5
    sampling.atol = 1e-5
    # The samples' labels, in turn: a number, several as 0,1,2, all, none, or a file of numbers.
    sampling.labels = "all"
    sampling.guidance = 0.0  # w in ε̂(x, c) + w (ε̂(x, c) - ε̂(x)), for the label c
    sampling.task = "generate"  # generate; with pc inpaint or colorize: eval.images or test images
    sampling.mask = "right"  # region to inpaint: left, right, top, bottom, center; or an image file
    sampling.batch_size = 64  # for --mode sample and the grids of training
    sampling.n_images = 64  # number of images of --mode sample
    sampling.format = "npz"  # of its images: npz or npy, all in one file; png, a file for each
    sampling.keep = 0  # states on the way to the first samples to show, in chain.png and chain.gif
    sampling.show_channels = ()  # one or three channels that pictures show; (): all, side by side

    config.eval = evaluation = ConfigDict()
    # Checkpoints to score: the steps are these numbers times training.snapshot_freq; both 0: the
    # newest checkpoint.
    evaluation.begin_ckpt = 0
    evaluation.end_ckpt = 0
    evaluation.samples = ""  # a folder of images or an .npz to score instead of a checkpoint
    evaluation.batch_size = 200  # for bits/dim; like the next, over all devices
    evaluation.sampling_batch_size = 0  # for samples; 0: eval.batch_size
    evaluation.enable_sampling = True
    evaluation.enable_bpd = True
    evaluation.enable_fid = True  # Inception: FID, KID, Inception score, precision and recall
    evaluation.num_samples = 50_000
    evaluation.num_reference = 0  # training images that samples are compared with; 0: all
    evaluation.inception_path = ""  # Inception's weights; empty: downloaded once to the cache
    evaluation.stats_path = ""  # statistics of the training images; empty: a file in the cache
    evaluation.num_test_data = 10_000
    evaluation.num_draws = 1  # draws of dequantisation and noise for each test image
    evaluation.image_draws = 4  # the same for each of eval.images; its error needs 2 or more
    evaluation.nelbo_draws = 4  # times t for each of these draws
    evaluation.truncated_normal = False  # bits/dim of the levels by truncated-normal noise, too
    evaluation.images = ""  # images whose bits/dim are wanted, or test; the scores of each in a CSV
    evaluation.nll_steps = 0  # fixed steps of a multistep method; 0: adaptive steps
    evaluation.rtol = 1e-5
    evaluation.atol = 1e-5
    evaluation.cache_dir = ""  # for extractors and statistics; empty: the user's cache folder
    return config.lock()  # so that a misspelt field in a recipe is an error

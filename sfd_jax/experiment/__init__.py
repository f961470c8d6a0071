"""From a config to networks, clocks, tasks, sources, targets and runs; and settings that several commands share.

    config = load_config("configs/sfd.py:xl", ["--config.data.path=latents"])    config_files.py
    run = open_diffusion(config)                                               training.py, one function a kind
    train(run, "runs/xl")                                                      run.py
    config = with_learned_clocks(config, "runs/xl")    before open_diffusion:  learned_clocks.py
    network, params, metadata = open_checkpoint("runs/xl", "lightning_dit")    checkpoints.py

extraction.py, sampling.py, evaluation.py and programs.py do the same for latents, samples, scores and programs for a
TPU slice; demo/ does all of it at small size. Commands, benchmarks, notebooks and tests build objects only here.
"""

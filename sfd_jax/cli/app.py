"""Serve a web page on which a model makes images.

  sfd app --model=demo_out
      the model of `sfd demo`, at http://127.0.0.1:7860
  sfd app --model=sfd_xl
      a released model, downloaded once; or a folder of Pipeline.save_pretrained, or OWNER/NAME on the hub
  sfd app --model=runs/sfd --texture_vae=runs/vae --weak=runs/weak --latents=latents
      a training run, with its training latents to search for neighbours

On the page: class, seed, number, guidance, solver; the images and their recipe; a slider on which semantics lead and
texture follows; the nearest training images. Requests are computed one after the other, and a few wait. Only this
machine can open the page unless --host=0.0.0.0 is given; then anyone who reaches it can make the machine compute.
"""

import os
from pathlib import Path

from sfd_jax.cli.flags import command_parser, parse_command, path
from sfd_jax.errors import needs_extra
from sfd_jax.ranges import Range


def main(argv: list[str]) -> int:
    """Open the model and serve the page until Ctrl-C."""
    parser = command_parser("app", __doc__)
    flag = parser.add_argument
    flag("--model", required=True, metavar="NAME", help="name or folder, as Pipeline.from_pretrained takes it")
    flag("--texture_vae", type=path, metavar="CKPT", help="texture VAE, for a model without one")
    flag("--weak", type=path, metavar="CKPT", help="weaker model for AutoGuidance")
    flag("--latents", type=path, metavar="DIR", help="training latents for neighbours (default: the demo's)")
    flag("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: every network (default: %(default)s)")
    flag("--port", type=int, default=7860, help="port to listen at (default: %(default)s)").range = Range(int, 1, 65535)
    args = parse_command(parser, argv)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    with needs_extra("app", "`sfd app`"):
        import gradio  # noqa: F401

    from sfd_jax.data.latent_store import LatentStore
    from sfd_jax.experiment.app import Studio, make_page, serve
    from sfd_jax.experiment.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(args.model, texture_vae=args.texture_vae, weak=args.weak)
    of_demo = Path(args.model) / "latents"
    latents = args.latents or (str(of_demo) if of_demo.is_dir() else None)
    page = make_page(Studio(pipeline, latents and LatentStore(latents)), f"Semantic-First Diffusion: {args.model}")
    serve(page, args.host, args.port)
    print(f"http://{args.host}:{args.port}  (Ctrl-C ends it)", flush=True)
    page.block_thread()
    return 0

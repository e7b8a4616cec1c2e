"""Masked residues of proteins, with any mixer that reads whole sequences.

    python -m experiments.train --config=configs/protein/residues.py:mixer=bimamba --workdir=runs/proteins-bimamba
    python -m experiments.train --config=configs/protein/residues.py:mixer=attention,kind=replaced --workdir=runs/proteins-replaced
    python -m experiments.train --config=configs/protein/residues.py:mixer=bi_mamba2,length=1024 --config.task.file=uniref50.fasta \
        --workdir=runs/uniref

Without a file the proteins are a stand-in with motifs, which neighbours tell, and pairs of residues 15 and more places apart, which they do
not; the test results print what frequencies and neighbours reach. mixer=bimamba is Mamba in both directions with shared projections, as in
LC-PLM (arXiv:2411.08909), and bi_NAME any causal mixer in both. 15% of the residues are chosen, of which 80% are hidden, 10% replaced and
10% kept; kind=replaced trains ELECTRA's generator and discriminator instead (see configs/lm/masked.py).

Options: mixer, kind, width, depth, generator, learning_rate, length (residues per row) and steps.

Results: experiments/results/proteins. Accuracy of masked residues of the stand-in after 300 steps: BiMamba 37%, LSTM in both directions
34% and attention 19%; the two neighbours tell 24%.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

MASKED = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "lm" / "masked.py"))


def get_config(arg: str = "") -> ConfigDict:
    sizes = dict(mixer="bimamba", width=64, depth=2, length=256, steps=1000)
    options = MASKED["read"]("protein/residues.py", arg, **sizes)
    task = dict(name="proteins", file=None, length=options["length"])
    return MASKED["config_of"](options, task)

from benchmarks.gpu.visit import run
from promoe_ds.utils.command_line import launcher

if __name__ == "__main__":
    _, console = launcher(run)
    console()

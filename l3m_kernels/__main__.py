"""`python -m l3m_kernels`: what runs here, and why not where not."""

from l3m_kernels import __version__, backends

if __name__ == "__main__":
    print(f"l3m_kernels {__version__}")
    print(backends())

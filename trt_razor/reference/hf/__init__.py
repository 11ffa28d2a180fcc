"""Any Hugging Face ``transformers`` decoder with Razor attention and a Razor cache.

    from trt_razor.reference import hf

    razor = hf.enable(model, HeadMap.load(Path("model.heads.json")), RazorPolicy())
    model.generate(**inputs, max_new_tokens=200)        # as usual
    razor.disable()

* ``switch``: enable and disable, which models can have it.
* ``cache``: the cache that ``transformers`` carries about, over ``reference.cache``.
* ``attention``: the functions registered with transformers' attention and mask interfaces.
* ``gpu``: the same caches handed to the CUDA kernels, where the library is there.

What is computed is docs/semantics.md by way of ``reference.cache``; how to use it docs/huggingface.md.
"""

from trt_razor.errors import MissingExtra

try:
    import transformers as _transformers  # noqa: F401
except ImportError:
    raise MissingExtra("transformers", "hf", "running Hugging Face models with Razor") from None

from trt_razor.reference.hf.cache import KvBytes, RazorCache
from trt_razor.reference.hf.switch import Razor, enable

__all__ = ["KvBytes", "Razor", "RazorCache", "enable"]

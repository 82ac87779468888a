# Written by iskd for AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).
try:
    from iskd.export import IskdConfig
    from iskd.loading import IskdForCausalLM
except ImportError as error:
    raise ImportError(
        "this student has compact blocks or converted mixers, whose code is in the package iskd: pip install iskd "
        f"({error})"
    ) from error

__all__ = ["IskdConfig", "IskdForCausalLM"]

"""The Hugging Face Hub: checks once, and quickly, whether it can be reached."""

from functools import cache


@cache
def look_for_hub() -> None:
    """Try to connect to the hub once; if that fails, set the hub's libraries offline.

    They then use their cache, or fail at once, rather than retry for half a minute each. A slow answer
    does not count as a failure: the libraries handle it.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # of the HTTP library, which differs between versions of the hub's library
        if "Timeout" in type(error).__name__:
            return
        import datasets

        constants.HF_HUB_OFFLINE = True  # where the environment variable of that name ends up
        datasets.config.HF_HUB_OFFLINE = True


@cache
def newest_revision(name: str, revision: str | None = None) -> str | None:
    """The current commit of a hub data set's branch or tag; None means its main branch.

    If the hub cannot be reached, the given revision: the cache is then used.
    """
    from huggingface_hub import HfApi, constants

    look_for_hub()
    try:
        return HfApi(endpoint=constants.ENDPOINT).dataset_info(name, revision=revision, timeout=10).sha
    except Exception:  # offline, no such name, no access: reading the data will report which
        return revision

"""The Hugging Face hub: whether it can be reached is found out once, and soon."""

from functools import cache


@cache
def look_for_hub() -> None:
    """Ask the hub's address once; where no connection comes about, the hub's libraries are set offline.

    They then take what they have cached, or fail at once, rather than try again for half a minute each. A slow answer
    does not count: the libraries wait for it as they like.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # of the HTTP library, which is another in each version of the hub's
        if "Timeout" in type(error).__name__:
            return
        import datasets

        constants.HF_HUB_OFFLINE = True  # where the environment variable of that name ends up
        datasets.config.HF_HUB_OFFLINE = True


@cache
def newest_revision(name: str, revision: str | None = None) -> str | None:
    """The commit of a data set of the hub that a branch, a tag or None (its main branch) stands for now.

    Where the hub cannot be asked, the revision as it was given: what is cached is then taken.
    """
    from huggingface_hub import HfApi, constants

    look_for_hub()
    try:
        return HfApi(endpoint=constants.ENDPOINT).dataset_info(name, revision=revision, timeout=10).sha
    except Exception:  # offline, no such name, no access: reading the data tells which
        return revision

"""Private interfaces of W&B."""


def is_logged_in(server: str) -> bool:
    """Whether a key for this server is known. ``wandb.login`` would ask for one.

    Raises:
        wandb.errors.Error: The key is malformed.
    """
    from wandb.sdk.lib import wbauth

    return wbauth.authenticate_session(host=server, source="tinylab", prompt=False, update_session=False) is not None

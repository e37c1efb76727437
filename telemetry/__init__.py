"""The contract between flight and ground: packets, frames, commands, link, spool, archive."""

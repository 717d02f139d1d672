"""Memory that draft and base share: the mailbox and how it is agreed on."""

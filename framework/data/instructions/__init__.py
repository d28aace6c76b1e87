"""Rows of instructions and chats: read, encoded, packed or padded into batches."""

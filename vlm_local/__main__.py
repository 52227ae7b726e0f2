from vlm_local.cli import start

start()

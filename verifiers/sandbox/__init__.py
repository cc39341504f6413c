"""cabochon.verifiers.sandbox: one door, `Sandbox.run(program, limits)`, and the isolations behind it."""

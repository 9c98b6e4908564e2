package main

// shortSpecs are those of -short: of everything a little, and of nothing what
// waits for seconds by the suite's own doing.
var shortSpecs = []string{
	`Mount Propagation `,
	`Mount Readonly .* should support `,
	`Idempotence `,
	`Image Consistency `,
	`Image Manager `,
	`Runtime info `,
	`starting container with volume \[Conformance\]$`,
	`support execSync \[Conformance\]$`,
	`removing running container `,
	`three created containers `,
	`support set hostname `,
	`Privileged is true$`,
	`support MaskedPaths$`,
	`adding capability$`,
	`dropping ALL capabilities$`,
	`seccomp localhost profile on the container$`,
	`support portforward \[Conformance\]$`,
	`tty=false and stdin=false `,
}

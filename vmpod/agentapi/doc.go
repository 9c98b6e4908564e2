// Package agentapi is the contract between the host and podinit, PID 1 of
// every pod VM: the generated ttrpc service Agent, and the session below it.
//
// The host calls Attach on whatever its Machine.Dial returned; the guest runs
// Serve on its end. Both sides treat the channel as something that breaks:
// a new attach is a new session, whatever the last one left half sent.
//
// The guest is not trusted: every frame that the host reads is capped, and
// garbage ends the session with an error, never the process.
package agentapi

//go:generate sh -c "protoc --proto_path=. --plugin=protoc-gen-go=$(go tool -n protoc-gen-go) --plugin=protoc-gen-go-ttrpc=$(go tool -n protoc-gen-go-ttrpc) --go_out=paths=source_relative:. --go-ttrpc_out=paths=source_relative:. agent.proto"

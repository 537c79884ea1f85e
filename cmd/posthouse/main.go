// Command posthouse is the mail appliance: server and command line in one.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"posthouse/appliance/command"
)

// version is set by the build.
var version = "unknown"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(command.Main(ctx, version, os.Args[1:], command.Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}))
}

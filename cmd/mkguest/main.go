// Command mkguest makes the kernel and the initramfs that pod VMs boot from.
// See package vmpod/guestimage.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/openatoll/atoll/vmpod/guestimage"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "mkguest:", err)
		os.Exit(1)
	}
}

func run() error {
	var o guestimage.Options
	var compression string
	flag.StringVar(&o.Out, "out", "build/guest", "guest `directory` to write")
	flag.StringVar(&o.Kernel, "kernel", "auto", "`flavour` of kernel: stock, tuned, or auto (tuned if it has been built)")
	flag.StringVar(&o.Podinit, "podinit", "bin/podinit", "static `program` that becomes /init")
	flag.StringVar(&o.TunedDir, "tuned-dir", "", "`directory` of tuned kernels (default: guest-kernel beside -out)")
	flag.StringVar(&compression, "compression", "", "of the initramfs: none, lz4 or zstd (default: what boots fastest)")
	quiet := flag.Bool("q", false, "say nothing unless something fails")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "Usage: mkguest [flags]\nMakes the kernel and the initramfs that pod VMs boot from.")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q (see -help)", flag.Arg(0))
	}
	o.Compression = guestimage.Compression(compression)
	level := slog.LevelInfo
	if *quiet {
		level = slog.LevelWarn
	}
	o.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	_, err := guestimage.Build(ctx, o)
	return err
}

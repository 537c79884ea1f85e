package command

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"posthouse/appliance"
	"posthouse/appliance/admin"
)

func (a *app) serve() *cobra.Command {
	return &cobra.Command{Use: "serve", Short: "Run the node",
		Long: `Runs this node until it is told to stop (SIGTERM): it then refuses new sessions,
lets those in hand finish, hands leadership over, and ends. It logs one JSON
line an event to standard error.`,
		Args: usage(cobra.NoArgs), RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := a.load()
			if err != nil {
				return err
			}
			var level slog.Level
			if err := level.UnmarshalText([]byte(cfg.LogLevel)); err != nil {
				return &ExitError{exConfig, err}
			}
			out := newLines(a.Err)
			defer out.Flush()
			logger := slog.New(prompt{slog.NewJSONHandler(out, &slog.HandlerOptions{Level: level}), out})
			if err := os.MkdirAll(filepath.Dir(cfg.ControlSocket), 0o755); err != nil {
				return &ExitError{exCantCreate, fmt.Errorf("make folder of the control socket: %w", err)}
			}
			// A socket that a killed node left is in the way of the next one; one
			// that answers is a living node's, which would be deaf without it.
			if answers(c.Context(), cfg.ControlSocket) {
				return &ExitError{exConflict, fmt.Errorf("a node runs already with the control socket %s; stop it first, or give this one a control_socket of its own", cfg.ControlSocket)}
			}
			if err := os.Remove(cfg.ControlSocket); err != nil && !errors.Is(err, os.ErrNotExist) {
				return &ExitError{exCantCreate, fmt.Errorf("remove the old control socket: %w", err)}
			}
			n, err := appliance.New(cfg, appliance.Real(cfg.Resolver, logger), a.version)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithCancel(c.Context())
			var wg sync.WaitGroup
			wg.Go(func() { tidy(ctx) })
			defer wg.Wait()
			defer cancel()
			return startError(n.Run(ctx))
		}}
}

// startError says what to do about a port that cannot be had.
func startError(err error) error {
	var op *net.OpError
	if !errors.As(err, &op) || op.Op != "listen" {
		return err
	}
	next := "name an address of this machine, or another port"
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		next = "another program holds it (ss -tulpn shows which); stop that one, or give another port in the configuration"
	case errors.Is(err, os.ErrPermission):
		next = "ports below 1024 want root or the packaged service; or give another port in the configuration"
	}
	return &ExitError{exCantCreate, fmt.Errorf("%w; %s", err, next)}
}

// dying is how long a process that was killed may hold what it had open: its
// memory goes first.
const dying = 2 * time.Second

// answers reports whether a living process listens on a control socket.
func answers(ctx context.Context, socket string) bool {
	for end := time.Now().Add(dying); ; {
		c, err := net.Dial("unix", socket)
		if err != nil {
			return false
		}
		c.Close()
		if time.Now().After(end) {
			return true
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return true
		}
	}
}

func (a *app) store() *cobra.Command {
	c := &cobra.Command{Use: "store", Short: "The message store on disk, while the node is stopped"}
	var data string
	folder := func() (string, error) {
		dir := data
		if dir == "" {
			cfg, err := a.load()
			if err != nil {
				return "", err
			}
			dir = cfg.Data
		}
		if _, err := os.Stat(filepath.Join(dir, "log")); errors.Is(err, os.ErrNotExist) {
			return "", &ExitError{exNoInput, fmt.Errorf("there is no store in %s; name the node's data folder with --data", dir)}
		}
		return dir, nil
	}
	flags := func(c *cobra.Command) *cobra.Command {
		c.Flags().StringVar(&data, "data", "", "the node's data folder (default from the configuration)")
		return c
	}
	verify := a.listing(flags(&cobra.Command{Use: "verify", Short: "Read everything and name what is damaged", Long: `Reads every file of a stopped node with its checksums (the message log, what the
election keeps, the key, the small files) and names file and offset of each
damage. Exit code 1 when there is any, 75 while the node runs. The index is not
read: it is checked at each start, and made anew from the log when need be.`, Args: usage(cobra.NoArgs), RunE: func(c *cobra.Command, _ []string) error {
		dir, err := folder()
		if err != nil {
			return err
		}
		r, err := appliance.VerifyStore(c.Context(), dir)
		if err != nil {
			return err
		}
		if a.json {
			if err := a.print(r, "", nil); err != nil {
				return err
			}
		} else {
			for _, d := range r.Damage {
				fmt.Fprintln(a.Out, printable(d.String()))
			}
			fmt.Fprintf(a.Out, "%d segments, %d records, %d bytes read; %d damaged places.\n", r.Segments, r.Records, r.Bytes, len(r.Damage))
		}
		if len(r.Damage) > 0 {
			return &ExitError{1, errors.New("the store is damaged; restore the named files from a backup")}
		}
		return nil
	}}))
	rebuild := flags(&cobra.Command{Use: "rebuild", Short: "Make the index anew from the message log", Long: `Makes the index anew from the message log: the same mailboxes, UIDs, flags and
expunges; nothing is sent again. The old index is kept aside. Stop the node
first.`, Args: usage(cobra.NoArgs), RunE: func(c *cobra.Command, _ []string) error {
		dir, err := folder()
		if err != nil {
			return err
		}
		n, notes, err := appliance.RebuildStore(c.Context(), dir, func(done, total uint64) {
			fmt.Fprintf(a.Err, "\r%d of %d records", done, total)
		})
		fmt.Fprintln(a.Err)
		if err != nil {
			var e *admin.Error
			if errors.As(err, &e) {
				return err
			}
			return &ExitError{exIOErr, err}
		}
		for _, x := range notes {
			fmt.Fprintln(a.Err, printable(x))
		}
		fmt.Fprintf(a.Out, "The index is made anew, up to record %d.\n", n)
		return nil
	}})
	compact := a.listing(flags(&cobra.Command{Use: "compact", Short: "Give back the disk that expunged and delivered mail takes", Long: `Writes two checkpoints of the index into the message log and rewrites every
segment of which something is not needed any more. A running node does the same
by itself, a little at a time. Stop the node first. It needs room for the
checkpoints and for what is still needed of one segment.`, Args: usage(cobra.NoArgs), RunE: func(c *cobra.Command, _ []string) error {
		dir, err := folder()
		if err != nil {
			return err
		}
		t, err := appliance.CompactStore(c.Context(), dir)
		if err != nil {
			return &ExitError{exIOErr, err}
		}
		if a.json {
			return a.print(t, "", nil)
		}
		fmt.Fprintf(a.Out, "%d segments rewritten: %s are %s now.\n", t.Segments, mebibytes(t.Before), mebibytes(t.After))
		return nil
	}}))
	c.AddCommand(verify, rebuild, compact)
	return c
}

package appliance

import (
	"context"
	"crypto/rand"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"time"

	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
	"posthouse/mesh/election"
)

// Environment is everything that a node takes from the machine that it runs
// on: the real one, or the simulator's. Nothing below appliance opens a socket,
// looks a name up or reads a clock's zone by itself.
type Environment struct {
	// Packet opens the mesh's UDP socket.
	Packet func(address string) (net.PacketConn, error)
	// Listen opens a TCP door or, with network "unix", the control socket.
	Listen func(ctx context.Context, network, address string) (net.Listener, error)
	// Dial connects to other hosts' mail servers.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Resolver looks names up; it obeys ctx.
	Resolver Resolver
	// Disk holds the log.
	Disk log.FS
	// View configures where the view lives; Dir is filled in by the node.
	View kv.Options
	// Election opens the election's files in a folder.
	Election func(dir string) (election.Storage, error)
	// Small files of the node: identity, intent, certificates.
	Files Files
	// Now is the wall clock, which people and time servers set: it may jump, and
	// has no monotonic reading. It says when things were, for people and other
	// machines: in headers, records, certificates and tokens. How long a thing
	// takes, and when a timer ends, is package time's, whatever this shows. Nil:
	// the machine's.
	Now func() time.Time
	// Random is a source of secrets and ids.
	Random io.Reader
	Logger *slog.Logger
}

// Resolver is the DNS as the node needs it. *net.Resolver is one.
type Resolver interface {
	LookupMX(ctx context.Context, name string) ([]*net.MX, error)
	LookupHost(ctx context.Context, host string) ([]string, error)
	LookupSRV(ctx context.Context, service, proto, name string) (string, []*net.SRV, error)
	LookupAddr(ctx context.Context, addr string) ([]string, error)
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// Real returns the environment of the machine that the program runs on.
// resolver is the address:port of a DNS server, or "" for the system's.
func Real(resolver string, logger *slog.Logger) Environment {
	r := &net.Resolver{PreferGo: true}
	if resolver != "" {
		r.Dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, resolver)
		}
	}
	return Environment{
		Packet: func(address string) (net.PacketConn, error) { return net.ListenPacket("udp", address) },
		Listen: func(ctx context.Context, network, address string) (net.Listener, error) {
			l, err := new(net.ListenConfig).Listen(ctx, network, address)
			if err == nil && network == "unix" { // whoever can open it administers the node
				if err = os.Chmod(address, 0o600); err != nil {
					l.Close()
				}
			}
			return l, err
		},
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, address)
		},
		Election: func(dir string) (election.Storage, error) { return election.NewFileStorage(dir) },
		Resolver: r, Disk: log.Disk{}, Files: osFiles{}, Random: rand.Reader, Logger: logger,
	}
}

package smtpout

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"

	"posthouse/mesh"
	"posthouse/transport"
)

// host is one place to try.
type host struct {
	name string // as MX has it, without the final dot; "" for an address literal
	addr netip.Addr
	port uint16
}

// label names the host in results.
func (h host) label() string {
	if h.name == "" {
		return "[" + h.addr.String() + "]"
	}
	return h.name
}

// maxMX bounds how many exchangers of a domain are looked at.
const maxMX = 16

// route finds the hosts of a domain in the order to try them: RFC 5321 section
// 5.1. A permanent fault says that there are none and will be none.
func (c *Carrier) route(outer context.Context, domain string) ([]host, error) {
	ctx, cancel := context.WithTimeout(outer, c.cfg.LookupTimeout)
	defer cancel()
	if s := c.cfg.Smarthost; s != nil {
		hs, err := c.addresses(ctx, s.Host, s.Port)
		if err != nil {
			return nil, &transport.Fault{Code: 451, Enhanced: "4.4.4", Text: "The smarthost's name cannot be looked up", Cause: err}
		}
		return hs, nil
	}
	if lit, ok := strings.CutPrefix(domain, "["); ok { // RFC 5321 section 4.1.3
		lit = strings.TrimSuffix(lit, "]")
		if len(lit) > 5 && strings.EqualFold(lit[:5], "ipv6:") {
			lit = lit[5:]
		}
		a, err := netip.ParseAddr(lit)
		if err != nil || !usable(a) {
			return nil, transport.Faultf(550, "5.1.2", "Bad address literal")
		}
		if c.deps.OwnAddr != nil && c.deps.OwnAddr(a) {
			return nil, loops(domain)
		}
		return []host{{addr: a, port: c.cfg.Port}}, nil
	}
	mxs, implicit, err := c.exchangers(ctx, mesh.DomainKey(domain))
	if outer.Err() != nil {
		return nil, context.Cause(outer)
	}
	if err != nil {
		return nil, err
	}
	var hosts []host
	var why error
	for _, mx := range mxs {
		hs, err := c.addresses(ctx, mx, c.cfg.Port)
		if err != nil {
			why = err
			continue
		}
		hosts = append(hosts, hs...)
		if len(hosts) >= c.cfg.MaxHosts {
			hosts = hosts[:c.cfg.MaxHosts]
			break
		}
	}
	switch {
	case outer.Err() != nil:
		return nil, context.Cause(outer)
	case len(hosts) > 0:
		return hosts, nil
	case why == errOwn:
		return nil, loops(domain)
	case implicit && notFound(why):
		return nil, &transport.Fault{Code: 550, Enhanced: "5.1.2", Text: "The domain " + domain + " does not exist or takes no mail", Cause: why}
	case notFound(why):
		return nil, &transport.Fault{Code: 451, Enhanced: "4.4.4", Text: "No mail exchanger of " + domain + " has an address", Cause: why}
	}
	return nil, &transport.Fault{Code: 451, Enhanced: "4.4.3", Text: "The mail exchangers of " + domain + " cannot be looked up", Cause: why}
}

func loops(domain string) error {
	return transport.Faultf(554, "5.4.6", "Mail for %s would come back here: its best mail exchanger is this mesh", domain)
}

// exchangers returns the names to try, best first, random among equals.
func (c *Carrier) exchangers(ctx context.Context, domain string) (names []string, implicit bool, err error) {
	mxs, err := c.deps.Resolver.LookupMX(ctx, domain)
	switch {
	case notFound(err) || err == nil && len(mxs) == 0:
		return []string{domain}, true, nil // RFC 5321 section 5.1: implicit MX
	case err != nil && len(mxs) == 0:
		return nil, false, &transport.Fault{Code: 451, Enhanced: "4.4.3", Text: "The mail exchangers of " + domain + " cannot be looked up", Cause: err}
	}
	// RFC 7505: a single "." means that the domain takes no mail.
	if len(mxs) == 1 && strings.TrimSuffix(mxs[0].Host, ".") == "" {
		return nil, false, transport.Faultf(556, "5.1.10", "The domain %s says that it takes no mail (null MX)", domain)
	}
	rnd, err := c.shuffler()
	if err != nil {
		return nil, false, err
	}
	mxs = slices.Clone(mxs)
	rnd.Shuffle(len(mxs), func(i, j int) { mxs[i], mxs[j] = mxs[j], mxs[i] })
	slices.SortStableFunc(mxs, func(a, b *net.MX) int { return int(a.Pref) - int(b.Pref) })
	if c.deps.OwnName != nil {
		// RFC 5321 section 5.1: from us on, equal and worse ones are dropped.
		for _, mx := range mxs {
			if c.deps.OwnName(mesh.DomainKey(mx.Host)) {
				mxs = slices.DeleteFunc(mxs, func(m *net.MX) bool { return m.Pref >= mx.Pref })
				break
			}
		}
		if len(mxs) == 0 {
			return nil, false, loops(domain)
		}
	}
	for _, mx := range mxs {
		if name := mesh.DomainKey(mx.Host); name != "" && len(names) < maxMX {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return nil, false, transport.Faultf(556, "5.1.10", "The domain %s says that it takes no mail (null MX)", domain)
	}
	return names, false, nil
}

var errOwn = errors.New("the address is our own")

// addresses looks one host up, in the resolver's order (RFC 6724).
func (c *Carrier) addresses(ctx context.Context, name string, port uint16) ([]host, error) {
	addrs := []netip.Addr{}
	if a, err := netip.ParseAddr(name); err == nil {
		addrs = append(addrs, a)
	} else if addrs, err = c.deps.Resolver.LookupNetIP(ctx, "ip", name); err != nil {
		return nil, err
	}
	var hs []host
	own := false
	for _, a := range addrs {
		a = a.Unmap()
		switch {
		case !usable(a):
		case c.deps.OwnAddr != nil && c.deps.OwnAddr(a):
			own = true
		default:
			hs = append(hs, host{name: name, addr: a, port: port})
		}
	}
	if len(hs) == 0 {
		if own {
			return nil, errOwn
		}
		return nil, &net.DNSError{Err: "no usable address", Name: name, IsNotFound: true}
	}
	return hs, nil
}

func usable(a netip.Addr) bool { return a.IsValid() && !a.IsUnspecified() && !a.IsMulticast() }

func notFound(err error) bool {
	var de *net.DNSError
	return errors.As(err, &de) && de.IsNotFound
}

func (c *Carrier) shuffler() (*rand.Rand, error) {
	var seed [16]byte
	if _, err := io.ReadFull(c.deps.Rand, seed[:]); err != nil {
		return nil, err
	}
	return rand.New(rand.NewPCG(binary.LittleEndian.Uint64(seed[:8]), binary.LittleEndian.Uint64(seed[8:]))), nil
}

// Package filter is the ordered chain of checks that a message passes before it
// is taken: each check returns a verdict, the chain makes one of them. intake
// calls it with the whole message on hand and nobody answered yet, so a refusal
// is told to the sender's server and nothing ever bounces.
//
// The chain ships empty: everything passes. To add a check:
//  1. write a type with Name and Check in a file of its own here;
//  2. let it need only what Mail has, and an interface for what it asks others;
//  3. give it a deadline of its own inside Check;
//  4. add it to the list that appliance/node.go hands to New, in its place;
//  5. add a row to TestTheFirstRefusalEndsTheChain's table of verdicts.
package filter

import (
	"context"
	"log/slog"

	"posthouse/transport"
)

// Mail is what a check may look at.
type Mail struct {
	Envelope   *transport.Envelope
	Recipients []string // addresses as the client gave them
	Body       transport.Body
}

// Verdict is what one check says.
type Verdict struct {
	// Fault refuses (5xx) or defers (4xx) the message; nil lets it pass.
	Fault *transport.Fault
	// Header lines to put on top of the message, each "Name: value" without its
	// line end; only of verdicts that let it pass.
	Header []string
}

// Check is one check. An error means that it could not tell: the chain defers
// the message, because what cannot be checked is neither taken nor lost.
type Check interface {
	Name() string
	Check(ctx context.Context, m *Mail) (Verdict, error)
}

// Chain runs checks in order.
type Chain struct {
	checks []Check
	log    *slog.Logger
}

// New returns a chain of those checks.
func New(log *slog.Logger, checks ...Check) *Chain { return &Chain{checks: checks, log: log} }

// Run returns the headers that the checks want, or the first fault.
func (c *Chain) Run(ctx context.Context, m *Mail) (header []string, fault *transport.Fault) {
	for _, k := range c.checks {
		v, err := k.Check(ctx, m)
		if err != nil {
			c.log.Warn("filter cannot tell", "check", k.Name(), "msg_id", m.Envelope.ID, "err", err)
			return nil, &transport.Fault{Code: 451, Enhanced: "4.7.1", Text: "The message cannot be checked now, try again later", Cause: err}
		}
		if v.Fault != nil {
			c.log.Info("filter refused", "check", k.Name(), "msg_id", m.Envelope.ID, "code", v.Fault.Code, "text", v.Fault.Text)
			return nil, v.Fault
		}
		header = append(header, v.Header...)
	}
	return header, nil
}

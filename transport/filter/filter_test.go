package filter

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"strings"
	"testing"

	"posthouse/transport"
)

type says struct {
	v   Verdict
	err error
	ran *string
}

func (s says) Name() string { return "says" }
func (s says) Check(context.Context, *Mail) (Verdict, error) {
	*s.ran += "x"
	return s.v, s.err
}

func TestTheFirstRefusalEndsTheChain(t *testing.T) {
	spam := transport.Faultf(550, "5.7.1", "spam")
	for _, tc := range []struct {
		name   string
		checks func(ran *string) []Check
		code   int
		header string
		ran    string
	}{
		{"no check lets everything pass", func(*string) []Check { return nil }, 0, "", ""},
		{"headers add up in order", func(r *string) []Check {
			return []Check{says{Verdict{Header: []string{"A: 1"}}, nil, r}, says{Verdict{Header: []string{"B: 2"}}, nil, r}}
		}, 0, "A: 1,B: 2", "xx"},
		{"a refusal is final", func(r *string) []Check {
			return []Check{says{Verdict{Fault: spam}, nil, r}, says{ran: r}}
		}, 550, "", "x"},
		{"what cannot be checked is deferred", func(r *string) []Check {
			return []Check{says{err: errors.New("timeout"), ran: r}, says{ran: r}}
		}, 451, "", "x"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ran := ""
			c := New(slog.New(slog.NewTextHandler(io.Discard, nil)), tc.checks(&ran)...)
			h, f := c.Run(t.Context(), &Mail{Envelope: &transport.Envelope{}})
			code := 0
			if f != nil {
				code = f.Code
			}
			if code != tc.code || strings.Join(h, ",") != tc.header || ran != tc.ran {
				t.Errorf("code %d, header %v, ran %q", code, h, ran)
			}
		})
	}
}

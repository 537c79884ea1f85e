package api

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"

	"posthouse/appliance/admin"
)

// Client speaks to a node's API. It implements admin.Operations.
type Client struct {
	http *http.Client
	base string
	name string // of the node, for sentences
}

// ErrNoAnswer is wrapped when the node did not answer at all.
var ErrNoAnswer = errors.New("nothing answers")

// Local returns a client of the node behind a control socket.
func Local(socket string) *Client {
	return &Client{base: "http://node" + Prefix, name: "behind " + socket, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}}}
}

func (c *Client) do(ctx context.Context, method, path string, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("make request: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.noAnswer(err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	var e admin.Error
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&e); err != nil || e.Text == "" {
		return nil, fmt.Errorf("%w as a node does: %s", ErrNoAnswer, resp.Status)
	}
	for k := admin.Usage; k <= admin.Internal; k++ {
		if k.HTTP() == resp.StatusCode {
			e.Kind = k
		}
	}
	return nil, &e
}

// noAnswer says why no node answers, and what to do.
func (c *Client) noAnswer(err error) error {
	var cause *net.OpError
	if errors.As(err, &cause) {
		err = cause.Err
	}
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%w %s: the node does not run; start it (posthouse serve, or systemctl start posthouse), or name another socket with --socket", ErrNoAnswer, c.name)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%w %s: you may not open it; try again as root (sudo), or as the user that the node runs as", ErrNoAnswer, c.name)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w %s: the node has ended; its log says why; start it (posthouse serve, or systemctl start posthouse)", ErrNoAnswer, c.name)
	}
	return fmt.Errorf("%w %s: %w", ErrNoAnswer, c.name, err)
}

func get[R any](ctx context.Context, c *Client, path string) (r R, err error) {
	resp, err := c.do(ctx, http.MethodGet, path, nil)
	if err != nil {
		return r, err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&r); err != nil {
		return r, fmt.Errorf("read answer of %s: %w", path, err)
	}
	return r, nil
}

func post[R any](ctx context.Context, c *Client, path string, q any) (r R, err error) {
	b, err := json.Marshal(q)
	if err != nil {
		return r, fmt.Errorf("write request: %w", err)
	}
	resp, err := c.do(ctx, http.MethodPost, path, b)
	if err != nil {
		return r, err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&r); err != nil {
		return r, fmt.Errorf("read answer of %s: %w", path, err)
	}
	return r, nil
}

func act(ctx context.Context, c *Client, path string, q any) error {
	_, err := post[none](ctx, c, path, q)
	return err
}

func tally(ctx context.Context, c *Client, path string, q any) (int, error) {
	n, err := post[counted](ctx, c, path, q)
	return n.Count, err
}

// Status implements admin.Operations.
func (c *Client) Status(ctx context.Context) (admin.Status, error) {
	return get[admin.Status](ctx, c, "status")
}

// Watch implements admin.Operations.
func (c *Client) Watch(ctx context.Context, f func(admin.Status) bool) error {
	resp, err := c.do(ctx, http.MethodGet, "events", nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxRequest)
	for lines.Scan() {
		data, ok := strings.CutPrefix(lines.Text(), "data: ")
		if !ok {
			continue
		}
		var s admin.Status
		if err := json.Unmarshal([]byte(data), &s); err != nil {
			return fmt.Errorf("read event: %w", err)
		}
		if !f(s) {
			return nil
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return fmt.Errorf("%w any more", ErrNoAnswer)
}

// Init implements admin.Operations.
func (c *Client) Init(ctx context.Context, r admin.InitRequest) (admin.InitResult, error) {
	return post[admin.InitResult](ctx, c, "init", r)
}

// Join implements admin.Operations.
func (c *Client) Join(ctx context.Context, r admin.JoinRequest) error { return act(ctx, c, "join", r) }

// Users implements admin.Operations.
func (c *Client) Users(ctx context.Context) ([]admin.User, error) {
	return get[[]admin.User](ctx, c, "users")
}

// CreateUser implements admin.Operations.
func (c *Client) CreateUser(ctx context.Context, r admin.UserChange) (admin.User, error) {
	return post[admin.User](ctx, c, "users/create", r)
}

// ChangeUser implements admin.Operations.
func (c *Client) ChangeUser(ctx context.Context, r admin.UserChange) (admin.User, error) {
	return post[admin.User](ctx, c, "users/change", r)
}

// DeleteUser implements admin.Operations.
func (c *Client) DeleteUser(ctx context.Context, address string) error {
	return act(ctx, c, "users/delete", named{address})
}

// Groups implements admin.Operations.
func (c *Client) Groups(ctx context.Context) ([]admin.Group, error) {
	return get[[]admin.Group](ctx, c, "groups")
}

// PutGroup implements admin.Operations.
func (c *Client) PutGroup(ctx context.Context, r admin.Group) (admin.Group, error) {
	return post[admin.Group](ctx, c, "groups/put", r)
}

// DeleteGroup implements admin.Operations.
func (c *Client) DeleteGroup(ctx context.Context, address string) error {
	return act(ctx, c, "groups/delete", named{address})
}

// Aliases implements admin.Operations.
func (c *Client) Aliases(ctx context.Context) ([]admin.Alias, error) {
	return get[[]admin.Alias](ctx, c, "aliases")
}

// CreateAlias implements admin.Operations.
func (c *Client) CreateAlias(ctx context.Context, r admin.Alias) (admin.Alias, error) {
	return post[admin.Alias](ctx, c, "aliases/create", r)
}

// DeleteAlias implements admin.Operations.
func (c *Client) DeleteAlias(ctx context.Context, address string) error {
	return act(ctx, c, "aliases/delete", named{address})
}

// Queue implements admin.Operations.
func (c *Client) Queue(ctx context.Context) ([]admin.QueueEntry, error) {
	return get[[]admin.QueueEntry](ctx, c, "queue")
}

// QueueRetry implements admin.Operations.
func (c *Client) QueueRetry(ctx context.Context, a admin.QueueAction) (int, error) {
	return tally(ctx, c, "queue/retry", a)
}

// QueueHold implements admin.Operations.
func (c *Client) QueueHold(ctx context.Context, a admin.QueueAction) (int, error) {
	return tally(ctx, c, "queue/hold", a)
}

// QueueRelease implements admin.Operations.
func (c *Client) QueueRelease(ctx context.Context, a admin.QueueAction) (int, error) {
	return tally(ctx, c, "queue/release", a)
}

// QueueDelete implements admin.Operations.
func (c *Client) QueueDelete(ctx context.Context, a admin.QueueAction) (int, error) {
	return tally(ctx, c, "queue/delete", a)
}

// Tokens implements admin.Operations.
func (c *Client) Tokens(ctx context.Context) ([]admin.Token, error) {
	return get[[]admin.Token](ctx, c, "mesh/tokens")
}

// CreateToken implements admin.Operations.
func (c *Client) CreateToken(ctx context.Context, r admin.TokenRequest) (admin.Token, error) {
	return post[admin.Token](ctx, c, "mesh/tokens/create", r)
}

// RevokeToken implements admin.Operations.
func (c *Client) RevokeToken(ctx context.Context, id string) error {
	return act(ctx, c, "mesh/tokens/revoke", named{id})
}

// PendingNodes implements admin.Operations.
func (c *Client) PendingNodes(ctx context.Context) ([]admin.Pending, error) {
	return get[[]admin.Pending](ctx, c, "mesh/pending")
}

// Approve implements admin.Operations.
func (c *Client) Approve(ctx context.Context, id string) error {
	return act(ctx, c, "mesh/approve", named{id})
}

// Refuse implements admin.Operations.
func (c *Client) Refuse(ctx context.Context, id string) error {
	return act(ctx, c, "mesh/refuse", named{id})
}

// ChangeNode implements admin.Operations.
func (c *Client) ChangeNode(ctx context.Context, r admin.NodeChange) error {
	return act(ctx, c, "mesh/node", r)
}

// RevokeNode implements admin.Operations.
func (c *Client) RevokeNode(ctx context.Context, name string) error {
	return act(ctx, c, "mesh/revoke", named{name})
}

// Transfer implements admin.Operations.
func (c *Client) Transfer(ctx context.Context, name string) error {
	return act(ctx, c, "mesh/transfer", named{name})
}

// Promote implements admin.Operations.
func (c *Client) Promote(ctx context.Context, r admin.PromoteRequest) (admin.PromoteResult, error) {
	return post[admin.PromoteResult](ctx, c, "mesh/promote", r)
}

// Forked implements admin.Operations.
func (c *Client) Forked(ctx context.Context) ([]admin.ForkedCommand, error) {
	return get[[]admin.ForkedCommand](ctx, c, "mesh/forked")
}

// Settings implements admin.Operations.
func (c *Client) Settings(ctx context.Context) (admin.Settings, error) {
	return get[admin.Settings](ctx, c, "mesh/settings")
}

// ChangeSettings implements admin.Operations.
func (c *Client) ChangeSettings(ctx context.Context, r admin.SettingsChange) (admin.Settings, error) {
	return post[admin.Settings](ctx, c, "mesh/settings", r)
}

var _ admin.Operations = (*Client)(nil)
